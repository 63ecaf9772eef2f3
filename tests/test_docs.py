"""The documentation is true: its code runs, its links resolve, and it names every key, code and command."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from fedgmr_plugin.cli import COMMANDS
from fedgmr_plugin.config import FedGMRConfig, parse
from fedgmr_plugin.errors import CATALOGUE, ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
TOP = [REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = [*TOP, *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]


def page_id(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """Contents of the fenced code blocks of one language."""
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", text, re.M | re.S)


def prose(path: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^(`{3,}).*?^\1$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def extension(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of docs/_ext."""
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    return importlib.import_module(name)


# -- code that stands in the pages -------------------------------------------------------------------------

LOAD = '''
def load(args):
    """A linearly separable toy: 4 clients with 40 samples each, and a test set of 80."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 8, generator=generator)
    y = (x[:, 0] > 0).long()
    train = {n: [(x[40 * n : 40 * n + 40], y[40 * n : 40 * n + 40])] for n in range(4)}
    counts = {n: 40 for n in range(4)}
    dataset = [160, 80, None, [(x[160:], y[160:])], counts, train, dict.fromkeys(range(4)), 2]
    return dataset, torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

'''

FEDML_KEYS = {
    "training_type": "simulation",
    "backend": "sp",
    "random_seed": 0,
    "dataset": "toy",
    "model": "toy",
    "federated_optimizer": "fedgmr",
    "client_num_in_total": 4,
    "client_num_per_round": 4,
    "comm_round": 30,
    "epochs": 1,
    "batch_size": 10,
    "client_optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "frequency_of_the_test": 10,
    "using_gpu": False,
    "enable_wandb": False,
}


def test_the_python_of_the_readme_trains_a_model(tmp_path: Path) -> None:
    register, trainer, run = blocks(REPOSITORY / "README.md", "python")
    (tmp_path / "main.py").write_text(register + trainer + LOAD + run, encoding="utf-8")
    (shown,) = blocks(REPOSITORY / "README.md", "yaml")
    settings = {"common_args": FEDML_KEYS, **yaml.safe_load(shown)}
    (tmp_path / "fedml_config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "main.py", "--cf", "fedml_config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^model sha256: [0-9a-f]{64}$", done.stdout + done.stderr, re.M)
    assert {p.name for p in (tmp_path / "fedgmr_runs" / "run-001").iterdir()} == {
        *("run.jsonl", "config.yaml", "command.json", "model.safetensors")
    }
    accuracies = re.findall(r"accuracy +([0-9.]+) %", done.stderr)
    assert float(accuracies[-1]) > 80  # the shipped model separates the toy


def test_the_quick_start_shows_the_same_code_as_the_readme() -> None:
    readme = blocks(REPOSITORY / "README.md", "python")
    quick = blocks(DOCS / "quickstart.md", "python")
    assert quick[0] == readme[0]
    assert quick[1].replace("import fedml\n", "") == readme[1].replace("import fedml\n", "")
    assert quick[2] in readme[2]


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_yaml_and_python_of_every_page_are_valid(path: Path) -> None:
    for block in blocks(path, "yaml"):
        section = yaml.safe_load(block).get("fedgmr_args")
        parse(section, where=page_id(path))
    for block in blocks(path, "python"):
        compile(block, page_id(path), "exec")


def test_the_example_of_an_error_is_what_fedgmr_says() -> None:
    (shown,) = blocks(DOCS / "errors.md", "text")
    with pytest.raises(ConfigError) as refused:
        parse({"density_min": 1.3}, where="fedml_config.yaml: fedgmr_args")
    assert str(refused.value) == shown.rstrip("\n")


def test_inline_options_of_the_baselines_are_accepted() -> None:
    table = (DOCS / "configuration.md").read_text(encoding="utf-8").split("## Baselines")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .* \| (`.*`) \|$", table, re.M)
    found = [dict([re.split(": ", option)]) for row in rows for option in re.findall(r"`(\w+: \w+)`", row)]
    assert len(found) >= 7
    for row in rows:
        options = yaml.safe_load("\n".join(re.findall(r"`(\w+: \w+)`", row)))
        parse(options, where="configuration.md")


# -- commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_named_in_the_pages_exist(path: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    console = "\n".join(blocks(path, "console")) + "\n".join(re.findall(r"`([^`\n]+)`", prose(path)))
    named = re.findall(r"(?:^\$ |^)make ((?:[a-z][a-z-]* ?)+)", console, re.M)
    assert {target for line in named for target in line.split()} <= targets
    assert set(re.findall(r"(?:^\$ |^)fedgmr ([a-z]+)", console, re.M)) <= set(COMMANDS)


def test_the_readme_opens_with_the_two_commands() -> None:
    assert blocks(REPOSITORY / "README.md", "console")[0] == "$ make demo\n$ make test\n"


def test_the_readme_lists_every_command() -> None:
    table = re.findall(r"^\| `fedgmr ([a-z]+)", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(table) == sorted(COMMANDS)


# -- completeness ------------------------------------------------------------------------------------------


def directives(page: str, name: str) -> list[str]:
    """Arguments of a directive's uses on one page."""
    return re.findall(rf"^```\{{{name}\}} (.+)$", (DOCS / page).read_text(encoding="utf-8"), re.M)


def test_every_configuration_key_is_described_once_in_order() -> None:
    names = list(FedGMRConfig.model_fields)
    described: list[str] = []
    for argument in directives("configuration.md", "config-keys"):
        first, last = argument.split()
        described += names[names.index(first) : names.index(last) + 1]
    assert described == names
    assert all(field.description for field in FedGMRConfig.model_fields.values())


def test_every_error_code_is_described_once() -> None:
    families = directives("errors.md", "error-codes")
    assert len(families) == len(set(families))
    assert [c for f in families for c in CATALOGUE if c.startswith(f"GMR-{f}")] == list(CATALOGUE)


def test_every_code_that_the_package_raises_is_in_the_catalogue() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "fedgmr_plugin").rglob("*.py")]
    assert {code for text in sources for code in re.findall(r"\bGMR-\d{3}\b", text)} == set(CATALOGUE)


def test_every_command_is_described_once() -> None:
    assert sorted(directives("cli.md", "command")) == sorted(COMMANDS)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_roles_name_what_exists(path: Path) -> None:
    known = {"key": set(FedGMRConfig.model_fields), "error": set(CATALOGUE), "cmd": set(COMMANDS)}
    for role, name in re.findall(r"\{(key|error|cmd)\}`([^`]+)`", path.read_text(encoding="utf-8")):
        assert name in known[role], f"{{{role}}}`{name}`"


# -- links -------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"[`*]|\{[a-z:]+\}", "", heading).strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text))


def anchors(path: Path) -> set[str]:
    """What a link into a page may name after the #."""
    found = {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(path), re.M)}
    return found | ({code.lower() for code in CATALOGUE} if path == DOCS / "errors.md" else set())


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_internal_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.is_file(), target
        if anchor:
            assert anchor in anchors(place), target


def test_the_anchor_that_an_error_names_is_on_the_page() -> None:
    for code in CATALOGUE:
        page, _, anchor = re.search(r"See (\S+)$", str(ConfigError(code, "")))[1].partition("#")  # type: ignore[index]
        assert anchor in anchors(REPOSITORY / page)


# -- the built pages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HTML pages, built without a warning."""
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_built_pages_load_nothing_from_the_network(built: Path) -> None:
    for path in built.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|link|img|iframe|source|video|audio|use)\b[^>]*>", text)
        remote = [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:[a-z]+:)?//", tag)]
        assert not remote, path.name
    for path in built.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", text), path.name


def test_built_pages_have_the_anchors_that_messages_and_roles_use(built: Path) -> None:
    errors = (built / "errors.html").read_text(encoding="utf-8")
    assert set(re.findall(r'id="(gmr-\d{3})"', errors)) == {code.lower() for code in CATALOGUE}
    keys = (built / "configuration.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<dt id="key-(\w+)"', keys)) == set(FedGMRConfig.model_fields)


def test_equations_are_mathml(built: Path) -> None:
    method = (built / "method.html").read_text(encoding="utf-8")
    assert method.count("<math ") > 50
    assert r"\frac" not in method


def test_no_markup_is_left_over(built: Path) -> None:
    for path in built.glob("*.html"):
        body = (
            path.read_text(encoding="utf-8").partition('<article role="main"')[2].partition("</article>")[0]
        )
        text = re.sub(r"<(pre|code|math)\b.*?</\1>", "", body, flags=re.S)
        text = re.sub(r"<[^>]+>", "", text)
        assert not re.search(r"\$|:::|\{(?:key|error|cmd|py:\w+|ref)\}", text), path.name


# -- what builds them --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("m * x and |w|", r"m \* x and \|w\|"),
        ("`m * x` and ``|w|``", "`m * x` and ``|w|``"),
        ("delta_S of x_ and w_0", r"delta_S of x\_ and w_0"),
        ("a\\b", r"a\\b"),
    ],
)
def test_docstrings_are_escaped_outside_of_code(
    line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extension("plain_docstrings", monkeypatch).escaped(line) == expected


def test_indented_blocks_of_docstrings_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["Title.", "", "    a * b", "      |c|", "", "Args:", "    x: m * y", "", "    z: |w|"]
    assert extension("plain_docstrings", monkeypatch).restructured(lines) == [
        *("Title.", "", "::", "", "    a * b", "      |c|", ""),
        *("Args:", r"    x: m \* y", "", r"    z: \|w\|"),
    ]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number in (0, 1]"),
        ({"type": "integer", "minimum": 1}, "integer in [1, inf)"),
        ({"type": "number"}, "number"),
        ({"enum": ["a", "b"], "type": "string"}, "one of `a`, `b`"),
        (
            {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "epochs"}]},
            "integer in [1, inf) or `epochs`",
        ),
        ({"type": "array", "items": {"type": "number", "maximum": 1}}, "list: numbers in (-inf, 1]"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text or absent"),
    ],
)
def test_ranges_in_words(schema: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension("fedgmr_docs", monkeypatch).allowed(schema) == expected


@pytest.mark.parametrize("value", [True, 5, 0.02, "high", (0.05, 1.0), ()])
def test_defaults_are_shown_as_yaml_reads_them(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = extension("fedgmr_docs", monkeypatch).in_yaml(value)
    assert yaml.safe_load(shown) == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    ("tex", "element"),
    [
        (r"\begin{align*} a &= b \\ c &= d \end{align*}", "<mtable"),
        (r"x_1, \dots, x_n", "…"),
        (r"\tfrac{1}{2}", "<mfrac>"),
    ],
)
def test_usual_latex_becomes_mathml(tex: str, element: str, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = extension("mathml", monkeypatch).mathml(tex, block=True)
    assert element in converted and "<merror" not in converted and r"\begin" not in converted


def test_the_picture_is_well_formed_and_self_contained() -> None:
    path = DOCS / "architecture.svg"
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert not re.search(r"href=|@import|url\(http", path.read_text(encoding="utf-8"))


def test_every_test_that_the_guarantees_name_exists(repository: Path) -> None:
    page = (repository / "docs" / "guarantees.md").read_text(encoding="utf-8")
    written = "".join(path.read_text(encoding="utf-8") for path in (repository / "tests").glob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in written} == set()
