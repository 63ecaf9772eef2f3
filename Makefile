# make demo   the demonstration, from a fresh clone     make docs   the documentation, with its examples run
# make test   lint, tests, documentation                make lint   ruff, mypy, import-linter
# make bench  every goal of speed and size, measured    make clean  remove everything that make made
#
# Python 3.10 or 3.11; PYTHON=/path/to/python chooses another than the first one found. pip takes a CPU
# build of torch where its configuration offers one, and PyPI's CUDA build (several GB) otherwise.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
INSTALL := $(PIP) install --quiet --quiet --constraint constraints.txt
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.10 python3 python; do \
    "$$p" -c '$(SUPPORTED)' 2>/dev/null && echo "$$p" && break; done)

APT := openmpi-bin libopenmpi-dev mosquitto
BUILT_FOR_TESTS := $(VENV)/installed-test

.PHONY: demo test coverage bench docs lint clean constraints system-packages

demo: $(VENV)/installed
	$(BIN)/fedgmr demo

test: system-packages lint
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder
	$(MAKE) --no-print-directory docs

# Not part of `test`: two threads that start while they are traced may end one of them (Python 3.11).
coverage: $(BUILT_FOR_TESTS)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --cov --cov-report=term

lint: $(BUILT_FOR_TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BUILT_FOR_TESTS)
	$(BIN)/python -m benchmarks.bench --out bench.json

docs: $(BUILT_FOR_TESTS)
	$(BIN)/sphinx-build --quiet --fail-on-warning --builder doctest docs docs/_build/doctest
	$(BIN)/sphinx-build --quiet --fail-on-warning --builder html docs docs/_build/html

# The stamps are newer than what they were installed from, so an installed environment stays as it is.
$(VENV)/installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
	    echo "fedgmr needs Python 3.10 or 3.11 (FedML 0.9.6 does not run on later ones); found: $(or $(PYTHON),none)."; \
	    echo "Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; } >&2
	@echo "Installing into $(VENV) (about 2 GB with a CPU build of torch; once)"
	[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV)
	$(INSTALL) torch torchvision
	$(INSTALL) --editable .
	$(PIP) check
	touch $@

$(BUILT_FOR_TESTS): $(VENV)/installed
	$(INSTALL) --editable ".[mpi,grpc,local,test,docs]"
	$(PIP) check
	touch $@

# For the tests of the MPI and MQTT runtimes. Without them, those tests are skipped.
system-packages:
	@if command -v mpicc >/dev/null && command -v mpirun >/dev/null && command -v mosquitto >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	      apt-get install -y -qq --no-install-recommends $(APT) >/dev/null; } || echo "could not install: $(APT)" >&2; \
	else echo "For the MPI and MQTT runtimes: sudo apt-get install $(APT)"; fi

# Resolve the newest versions that pyproject.toml allows, for both Pythons at once.
constraints: $(VENV)/installed
	$(PIP) install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --no-annotate --no-header \
	    --quiet --output-file $(VENV)/resolved.txt
	{ sed -n '/^#/p' constraints.txt; \
	  grep -E '^torch(vision)?==' $(VENV)/resolved.txt; \
	  grep -vE "^torch(vision)?==|^[^ ]+ ; .*sys_platform == 'win32'|python_full_version >= '3.12'" $(VENV)/resolved.txt; \
	} > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) build dist bench.json docs/_build .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache \
	    .import_linter_cache .hypothesis
	find fedgmr_plugin theory tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
