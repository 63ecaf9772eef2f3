"""`federated_optimizer: fedgmr` reaches the builder; every other optimizer stays FedML's own."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import logging
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fedgmr_plugin import __main__ as entry
from fedgmr_plugin.cli.run import run
from fedgmr_plugin.errors import ConfigError, HostError
from fedgmr_plugin.runtimes import command, config_file, host, registration, uncaught
from fedgmr_plugin.runtimes.distributed import fedml_nccl, job

FEDAVG = """
import hashlib, json, socket, sys

lookups = []
def refuse(host, *rest, **keywords):
    lookups.append(str(host))
    raise OSError("no network")
socket.getaddrinfo = refuse

import fedgmr_plugin
from fedgmr_plugin.runtimes import host, registration
if "--registered" in sys.argv:
    fedgmr_plugin.register()
elif not host.torchvision_usable():
    host.define_torchvision_schemas()

import fedml, torch

def loader(seed, count=24):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    y = torch.randint(0, 3, (count,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)

args = fedml.init()
train = {n: loader(n) for n in range(3)}
test = {n: loader(10 + n) for n in range(3)}
counts = {n: 24 for n in range(3)}
dataset = [72, 72, loader(20), loader(21), counts, train, test, 3]
layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)
model = torch.nn.Sequential(*layers)
before = [p.clone() for p in model.parameters()]
fedml.FedMLRunner(args, torch.device("cpu"), dataset, model).run()
assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()
with open(sys.argv[-1], "w") as file:
    json.dump({"digest": digest, "lookups": lookups, "registered": registration.registered()}, file)
"""

YAML = """
common_args: {training_type: simulation, random_seed: 7}
data_args: {dataset: synthetic}
model_args: {model: mlp}
train_args:
  federated_optimizer: FedAvg
  client_num_in_total: 3
  client_num_per_round: 2
  comm_round: 3
  epochs: 2
  batch_size: 8
  client_optimizer: sgd
  learning_rate: 0.1
  weight_decay: 0.0
validation_args: {frequency_of_the_test: 1}
device_args: {using_gpu: false}
comm_args: {backend: sp}
tracking_args: {enable_wandb: false, using_mlops: false}
"""


def start(folder: Path, repository: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "main.py").write_text(f"import sys; sys.path.insert(0, {str(repository)!r})\n{FEDAVG}")
    (folder / "fedml_config.yaml").write_text(YAML)
    command = [sys.executable, "main.py", "--cf", "fedml_config.yaml", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_fedavg_of_fedml_is_bit_identical_and_needs_no_network(tmp_path: Path, repository: Path) -> None:
    processes = [
        start(tmp_path, repository, "plain.json"),
        start(tmp_path, repository, "--registered", "registered.json"),
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    plain = json.loads((tmp_path / "plain.json").read_text())
    registered = json.loads((tmp_path / "registered.json").read_text())
    assert "SimulatorSingleProcess" in registered["registered"] and plain["registered"] == []
    assert registered["digest"] == plain["digest"]
    assert plain["lookups"] != [], "FedML no longer contacts its cloud; the workaround can go"
    assert registered["lookups"] == []


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    registration.register()
    yield
    registration.unregister()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments with which `single_process.build` was called."""
    calls: list[tuple[Any, ...]] = []

    def build(*arguments: Any) -> SimpleNamespace:
        calls.append(arguments)
        return SimpleNamespace(train=lambda: calls.append(("trained",)))

    from fedgmr_plugin import runtimes

    module = types.ModuleType("fedgmr_plugin.runtimes.single_process")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(runtimes, "single_process", module, raising=False)
    return calls


@pytest.mark.parametrize("name", ["fedgmr", "FedGMR", "FEDGMR", "fEdGmR"])
def test_any_letter_case_reaches_the_builder(registered: None, built: list[Any], name: str) -> None:
    from fedml.simulation import SimulatorSingleProcess

    args = SimpleNamespace(federated_optimizer=name)
    SimulatorSingleProcess(args, "cpu", ["data"], "model", "trainer", "aggregator").run()
    assert built == [(args, "cpu", ["data"], "model", "trainer", "aggregator"), ("trained",)]
    built.clear()
    SimulatorSingleProcess(args=args, device="cpu", dataset=["data"], model="model").run()
    assert built[0] == (args, "cpu", ["data"], "model", None, None)


@given(st.one_of(st.text(max_size=8), st.none(), st.integers(), st.binary(max_size=8), st.just(["fedgmr"])))
def test_nothing_else_is_fedgmr(value: object) -> None:
    assert registration.is_fedgmr(value) == (isinstance(value, str) and value.casefold() == "fedgmr")


REFUSED = {
    "FedMLCrossSiloServer": ("fedml.cross_silo.fedml_server", "cross_silo", "TRPC"),
    "FedMLCrossSiloClient": ("fedml.cross_silo.fedml_client", "cross_silo", "MQTT_WEB3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_runtimes_say_what_works(registered: None, name: str) -> None:
    module, training_type, backend = REFUSED[name]
    args = SimpleNamespace(federated_optimizer="FedGMR", training_type=training_type, backend=backend)
    with pytest.raises(HostError) as caught:
        getattr(sys.modules[module], name)(args, "cpu", [], "model")
    message = str(caught.value)
    assert message.startswith("GMR-502 ") and repr(training_type) in message and repr(backend) in message
    assert 'training_type: "simulation"' in message and 'backend: "sp"' in message and name in message


def test_the_table_covers_every_constructor_of_fedml_that_dispatches_by_name(registered: None) -> None:
    import fedml

    found = {
        path.relative_to(Path(fedml.__file__).parent.parent).with_suffix("").as_posix().replace("/", ".")
        for folder in ("simulation", "cross_silo", "cross_device")
        for path in (Path(fedml.__file__).parent / folder).glob("*.py")
        if "args.federated_optimizer ==" in path.read_text(encoding="utf-8")
    }
    assert {dispatch.module for dispatch in registration.TABLE} == found
    simulators = {"SimulatorSingleProcess", "SimulatorMPI", "SimulatorNCCL"}
    assert set(REFUSED) | simulators <= set(registration.registered())


def test_registering_is_idempotent_and_reversible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    host.prepare()
    from fedml.simulation import SimulatorSingleProcess as cls

    original = cls.__init__
    registration.register()
    wrapper = cls.__init__
    assert wrapper is not original and wrapper.__wrapped__ is original
    names = registration.registered()
    registration.register()
    assert cls.__init__ is wrapper and registration.registered() == names
    registration.unregister()
    assert cls.__init__ is original and registration.registered() == () and host.workarounds() == ()
    registration.unregister()
    assert cls.__init__ is original


class Recorder:
    """Stands in for a FedML class: it keeps what its constructor was given."""

    def __init__(self, args: Any, *rest: Any, **keywords: Any) -> None:
        self.given = (args, rest, keywords)


@pytest.fixture
def recorder() -> Iterator[type[Recorder]]:
    fresh = type("Fresh", (Recorder,), {"__init__": lambda self, *a, **k: Recorder.__init__(self, *a, **k)})
    yield fresh
    registration.unregister()


def test_other_optimizers_get_their_arguments_untouched(recorder: type[Recorder]) -> None:
    registration.wrap(recorder, lambda *_, **__: pytest.fail("not for this builder"))
    for args in (SimpleNamespace(federated_optimizer="FedAvg"), SimpleNamespace(), None):
        assert recorder(args, 1, b=2).given == (args, (1,), {"b": 2})
        assert recorder(args=args, b=2).given == (args, (), {"b": 2})


def test_a_wrapper_that_others_wrapped_passes_on_after_unregister(recorder: type[Recorder]) -> None:
    built: list[Any] = []
    args = SimpleNamespace(federated_optimizer="fedgmr")
    registration.wrap(recorder, lambda self, *rest: built.append(rest))
    ours = recorder.__init__  # type: ignore[misc]
    theirs = lambda self, *a, **k: ours(self, *a, **k)  # noqa: E731
    recorder.__init__ = theirs  # type: ignore[misc]
    recorder(args, 1)
    assert built == [(args, 1)]
    registration.unregister()
    assert recorder.__init__ is theirs  # type: ignore[misc]
    assert recorder(args, 1).given == (args, (1,), {}) and len(built) == 1
    registration.wrap(recorder, lambda self, *rest: built.append(("again", *rest)))
    recorder(args, 1)
    assert built[1:] == [("again", args, 1)]


def test_another_fedml_is_refused_and_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(host, "installed_fedml", lambda: "0.9.7")
    with pytest.raises(HostError, match="GMR-501"):
        registration.register()
    assert registration.registered() == ()


# -- the YAML file ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("", None),
        ("--rank 0 --role server", None),
        ("--cf a.yaml", "a.yaml"),
        ("--cf=a.yaml --rank 1", "a.yaml"),
        ("--rank 1 --yaml_config_file a.yaml", "a.yaml"),
        ("--yaml a.yaml", "a.yaml"),  # argparse, which FedML uses, accepts abbreviations
        ("--cf a.yaml --cf b.yaml", "b.yaml"),
        ("--cov --cf=", None),
    ],
)
def test_the_path_is_read_from_the_command_line_as_fedml_reads_it(line: str, path: str | None) -> None:
    assert config_file.path_from(line.split()) == path


def test_cf_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="GMR-108"):
        config_file.path_from(["--cf"])


def test_sections_are_read_and_flattened(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: {x: 1, y: 2}\nb: {y: 3}\n")
    assert config_file.load(str(path)) == {"a": {"x": 1, "y": 2}, "b": {"y": 3}}
    assert config_file.flatten(config_file.load(str(path))) == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "is a list, not sections"),
        (b"just text\n", "is a str, not sections"),
        (b"a: {x: 1}\nrounds: 3\n", "has 'rounds' at its top level"),
        (b"a:\n", "has an empty section 'a'"),
        (b"a: {x: 1\nb: ]\n", "is not valid YAML: .*line 2"),
        (b"a:\n\tx: 1\n", "is not valid YAML: .*line 2"),
        (b"a: !!python/object/apply:os.system [exit]\n", "is not valid YAML"),
        (b"a: {x: \xff}\n", "is not UTF-8"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "fedml_config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"GMR-108 --cf .*{problem}"):
        config_file.load(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="GMR-108 .*cannot be read"):
            config_file.load(str(path))


def test_register_checks_the_file_before_it_touches_fedml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "prepare", lambda: pytest.fail("too late"))
    monkeypatch.setattr(sys, "argv", ["main.py", "--cf", "no-such-file.yaml"])
    with pytest.raises(ConfigError, match="GMR-108"):
        registration.register()


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ("training_type: simulation, backend: sp", False),
        ("training_type: simulation", False),
        ("model: mlp", False),
        ("training_type: simulation, backend: TRPC", True),
        ("training_type: cross_silo", True),
        ("training_type: cross_silo, backend: MQTT_WEB3", True),
        ("training_type: cross_silo, backend: GRPC", False),
        ("training_type: cross_silo, backend: MQTT_S3", False),
        ("training_type: cross_device, backend: MQTT_S3_MNN", False),
        ("training_type: cross_device, backend: MQTT_S3", True),
    ],
)
def test_an_unsupported_runtime_is_refused_before_fedml_starts_it(
    tmp_path: Path, settings: str, refused: bool
) -> None:
    path = tmp_path / "c.yaml"
    for optimizer, expected in (("FedGMR", refused), ("FedAvg", False)):
        path.write_text(f"all: {{federated_optimizer: {optimizer}, {settings}}}\n")
        if expected:
            with pytest.raises(HostError, match="GMR-502"):
                registration.check_command_line(["--cf", str(path)])
        else:
            registration.check_command_line(["--cf", str(path)])


MPI = "training_type: simulation, backend: MPI"


def refuse(name: str) -> Any:
    raise RuntimeError("no library")


@pytest.mark.parametrize(
    ("settings", "launched", "error"),
    [
        (MPI, False, "GMR-508 backend='MPI'.*mpirun -np 3 python -m fedgmr_plugin"),
        ("backend: NCCL", False, "GMR-508 backend='NCCL'.*torchrun --nproc_per_node=3 -m fedgmr_plugin"),
        (MPI, True, "GMR-107 gpu_mapping_key missing"),
        (f"{MPI}, using_gpu: true", True, "GMR-107 gpu_mapping_key, gpu_mapping_file missing"),
        (f"{MPI}, gpu_mapping_key: null", True, "GMR-509 import mpi4py.MPI failed: no library"),
        ("backend: NCCL", True, None),
    ],
)
def test_jobs_of_several_processes_are_checked_before_fedml_joins_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, launched: bool, error: str | None
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"all: {{federated_optimizer: fedgmr, {settings}}}\n")
    for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
        if launched:
            monkeypatch.setenv(name, "0")
    monkeypatch.setattr(job, "_ours", [])
    monkeypatch.setattr(job.importlib, "import_module", refuse)
    if error is None:
        registration.check_command_line(["--cf", str(path)])
        assert job.is_ours()
        return
    with pytest.raises((HostError, ConfigError)) as caught:
        registration.check_command_line(["--cf", str(path)])
    assert re.match(error, str(caught.value), re.DOTALL)


def test_the_modules_that_fedml_lacks_are_there_while_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "fedml.simulation.nccl.base_framework.common"
    monkeypatch.setattr(sys, "argv", ["main.py"])
    registration.register()
    registration.register()
    common = importlib.import_module(name)
    api = importlib.import_module("fedml.simulation.nccl.fedavg.FedAvgAPI")
    args = common.FedML_NCCL_Similulation_init(SimpleNamespace(backend="NCCL"))
    assert (args.rank, args.process_id, args.worker_num, args.role) == (0, 0, 1, "server")
    assert args.gpu_mapping_key is None and callable(api.FedML_FedAvg_NCCL)
    registration.unregister()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_modules_that_fedml_has_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    host.prepare()
    import fedml.simulation as simulation

    theirs = types.ModuleType("fedml.simulation.nccl")
    theirs.__spec__ = importlib.machinery.ModuleSpec(theirs.__name__, None)
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    fedml_nccl.supply()
    assert sys.modules[theirs.__name__] is theirs and not hasattr(simulation, "nccl")
    fedml_nccl.withdraw()
    assert sys.modules[theirs.__name__] is theirs
    host.restore()


def test_likely_slips_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    train = "train_args: {federated_optimizer: %s, local_steps: 9}\n"
    tracking = "tracking_args: {run_name: wandb-needs-it}\n"
    for name, slip in (
        ("FedGRM", "note: federated_optimizer='FedGRM' is not fedgmr; did you mean \"fedgmr\"?\n"),
        ("FedGMR", "note: local_steps in train_args has no effect: options of fedgmr belong in "),
    ):
        path.write_text(train % name + tracking + "fedgmr_args: {trigger: none}\n")
        registration.check_command_line(["--cf", str(path)])
        assert capsys.readouterr().err.startswith(slip)
    path.write_text("train_args: {comm_round: 3}\nfedgmr_args: {trigger: none}\n")
    registration.check_command_line(["--cf", str(path)])
    assert 'has no effect: there is no `federated_optimizer: "fedgmr"`' in capsys.readouterr().err
    path.write_text("train_args: {federated_optimizer: FedGMR}\n" + tracking)
    registration.check_command_line(["--cf", str(path)])
    assert capsys.readouterr().err == ""


def test_what_a_file_says_twice_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "t:\n  federated_optimizer: fedgmr\n  x: 1\n"
        "fedgmr_args:\n  patience: 2\n  interval: 5\n  patience: 3\n"
        "t: {federated_optimizer: fedgmr, x: {y: 1, y: 2}}\n"
    )
    registration.check_command_line(["--cf", str(path)])
    assert capsys.readouterr().err.splitlines() == [
        "note: section t stands in lines 1 and 8: the last counts",
        "note: patience in fedgmr_args stands in lines 5 and 7: the last counts",
    ]


@pytest.mark.parametrize(
    ("section", "code", "place"),
    [
        ("fedgmr_arg: {trigger: none}", "GMR-101", "c.yaml: fedgmr_arg"),
        ("FedGMR-args: {trigger: none}", "GMR-101", "c.yaml: FedGMR-args"),
        ("fedgrm_args: {trigger: none}", "GMR-101", "c.yaml: fedgrm_args"),
        ("gmr: {trigger: none}", "GMR-101", "c.yaml: gmr"),
        ("fedgmr_args: {12: 3}", "GMR-101", "c.yaml: fedgmr_args.12"),
        ("fedgmr_args: {trigger: off}", "GMR-102", "c.yaml: fedgmr_args.trigger"),
        ("train: {batch_size: 0}", "GMR-104", "c.yaml: batch_size"),
        ("train: {random_seed: -1}", "GMR-104", "c.yaml: random_seed"),
        ("train: {client_num_per_round: 4}", "GMR-104", "c.yaml: client_num_per_round"),
        ("fedgmr_args: {trigger: never}", "GMR-103", "c.yaml: fedgmr_args.trigger"),
        ("fedgmr_args: {densities: [1.0, 0.5]}", "GMR-109", "c.yaml: fedgmr_args.densities"),
        ("fedgmr_args: {compute_slowdown: [1.0]}", "GMR-109", "c.yaml: fedgmr_args.compute_slowdown"),
        ("fedgmr_args:", "GMR-108", "c.yaml"),
        ("fedgmr_args: [1]", "GMR-108", "c.yaml"),
        ("train: {fedgmr_args: [1]}", "GMR-102", "c.yaml: fedgmr_args"),
    ],
)
def test_options_are_checked_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, code: str, place: str
) -> None:
    monkeypatch.setattr(host, "prepare", lambda: pytest.fail("too late"))
    path = tmp_path / "c.yaml"
    common = "all: {federated_optimizer: %s, client_num_in_total: 3}\n"
    path.write_text(common % "fedgmr" + section + "\n")
    monkeypatch.setattr(sys, "argv", ["main.py", "--cf", str(path)])
    with pytest.raises(ConfigError) as refusal:
        registration.register()
    registration.unregister()
    assert refusal.value.code == code and refusal.value.where.endswith(place)
    if code != "GMR-108":
        path.write_text(common % "FedAvg" + section + "\n")
        registration.check_command_line(["--cf", str(path)])


@pytest.mark.parametrize("name", ["fed_args", "model_args", "train_args", "federate_args", "gmr_sweep_args"])
def test_sections_of_other_names_stay_free(tmp_path: Path, name: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"all: {{federated_optimizer: fedgmr, on: 1, 12: x}}\n{name}: {{own: 1}}\n")
    registration.check_command_line(["--cf", str(path)])


def test_a_script_that_registers_ends_with_the_message_alone(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("t: {federated_optimizer: fedgmr}\nfedgmr_args: {density_min: 1.3}\n")
    script = "import fedgmr_plugin; fedgmr_plugin.register()"
    done = subprocess.run(
        [sys.executable, "-c", script, "--cf", "c.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(
        "GMR-104 density_min=1.3 is outside (0, 1]\n        in c.yaml: fedgmr_args."
    )


def test_the_hook_shows_our_errors_and_passes_others_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def ours() -> None:
        sys.excepthook(HostError, HostError("GMR-502", "ours"), None)
        sys.excepthook(ValueError, ValueError(), None)

    def first(kind: Any, error: BaseException, trace: Any) -> None:
        seen.append(f"first {kind.__name__}")

    monkeypatch.setattr(sys, "excepthook", first)
    uncaught.install()
    ours()
    assert capsys.readouterr().err.startswith("GMR-502 ours\n") and seen == ["first ValueError"]

    below = sys.excepthook  # somebody puts a hook over ours that calls it, as error trackers do
    sys.excepthook = lambda *error: (seen.append("tracker"), below(*error))
    uncaught.install()
    ours()
    assert seen[1:] == ["tracker", "tracker", "first ValueError"]
    uncaught.restore()
    ours()
    assert seen[4:] == ["tracker", "tracker", "first ValueError"]

    monkeypatch.setattr(sys, "excepthook", first)
    uncaught.install()
    uncaught.restore()
    uncaught.restore()
    assert sys.excepthook is first


@pytest.mark.parametrize(
    ("module", "is_ours"), [("fedgmr_plugin.runtimes.recorded", True), ("__main__", False)]
)
def test_an_interrupt_of_a_run_of_ours_is_shown_in_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, is_ours: bool
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: seen.append(error[0]))

    def interrupted() -> None:
        raise KeyboardInterrupt

    train = FunctionType(interrupted.__code__, {"__name__": module})
    uncaught.install()
    try:
        with pytest.raises(KeyboardInterrupt) as found:
            train()
        sys.excepthook(KeyboardInterrupt, found.value, found.tb)
    finally:
        uncaught.restore()
    assert seen == ([] if is_ours else [KeyboardInterrupt])
    assert capsys.readouterr().err == ("\nAborted!\n" if is_ours else "")


def test_fedmls_own_hook_shows_our_errors_by_their_message(
    registered: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fedml.init` puts it over ours."""
    from fedml.core.mlops.mlops_runtime_log import MLOpsRuntimeLog

    logged: list[Any] = []
    monkeypatch.setattr(logging, "error", lambda *given, **more: logged.append(given))
    monkeypatch.setattr("fedml.mlops.log_aggregation_exception_status", lambda *_, **__: None)
    MLOpsRuntimeLog.handle_exception(HostError, HostError("GMR-502", "ours"), None)
    assert capsys.readouterr().err.startswith("GMR-502 ours\n") and not logged
    MLOpsRuntimeLog.handle_exception(ValueError, ValueError(), None)
    assert logged == [("Uncaught exception",)]
    registration.unregister()
    MLOpsRuntimeLog.handle_exception(HostError, HostError("GMR-502", "ours"), None)
    assert len(logged) == 2


# -- `fedgmr run` ----------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`run` without FedML: registering is only noted. argv and sys.path are put back."""
    order: list[str] = []
    monkeypatch.setattr(registration, "register", lambda: order.append("registered"))
    monkeypatch.setattr(sys, "argv", ["fedgmr"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return order


def test_run_gives_the_script_its_arguments_name_and_folder(tmp_path: Path, quiet: list[str]) -> None:
    (tmp_path / "neighbour_of_main.py").write_text("VALUE = 41\n")
    (tmp_path / "main.py").write_text(
        "import sys, neighbour_of_main as n\n"
        "if __name__ == '__main__':\n    print(sys.argv[1:], n.VALUE + 1, sys.argv[0] == __file__)\n"
    )
    result = CliRunner().invoke(
        run, [str(tmp_path / "main.py"), "--cf", "x.yaml", "--help", "-v", "--", "last"]
    )
    assert result.exit_code == 0, result.output
    assert result.output == "['--cf', 'x.yaml', '--help', '-v', '--', 'last'] 42 True\n"
    assert quiet == ["registered"]


def test_run_shows_an_error_of_ours_without_traceback(tmp_path: Path, quiet: list[str]) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "from fedgmr_plugin.errors import HostError as E\nraise E('GMR-502', 'wrong place', where='here')\n"
    )
    result = CliRunner().invoke(run, [str(script)])
    assert result.exit_code == 2 and result.output.startswith("GMR-502 wrong place\n        in here\n")
    assert "Traceback" not in result.output


def test_run_leaves_the_script_its_own_exit(tmp_path: Path, quiet: list[str]) -> None:
    script = tmp_path / "main.py"
    script.write_text("raise SystemExit(5)\n")
    assert CliRunner().invoke(run, [str(script)]).exit_code == 5
    script.write_text("raise ZeroDivisionError\n")
    assert isinstance(CliRunner().invoke(run, [str(script)]).exception, ZeroDivisionError)


def test_a_traceback_of_a_script_begins_at_the_script(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text("def inner():\n    raise ZeroDivisionError('mine')\ninner()\n")
    command = [sys.executable, "-m", "fedgmr_plugin", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shown = done.stderr[done.stderr.index("Traceback") :]
    assert done.returncode == 1 and shown.count("  File ") == 2, done.stderr
    assert f'File "{script}", line 3' in shown and shown.endswith("ZeroDivisionError: mine\n")
    assert "main.py --cf fedml_config.yaml" in done.stderr  # the note for a script without one


def test_run_says_when_a_script_was_given_no_configuration(tmp_path: Path, quiet: list[str]) -> None:
    script, yaml = tmp_path / "main.py", tmp_path / "c.yaml"
    script.write_text("raise ZeroDivisionError\n")
    assert "was given no --cf" in CliRunner().invoke(run, [str(script)]).output
    assert "no --cf" not in CliRunner().invoke(run, [str(script), "--cf", str(yaml)]).output


def test_run_shows_where_a_users_own_trainer_failed(tmp_path: Path, quiet: list[str]) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "from fedgmr_plugin.errors import HostError as E\n"
        "try:\n    [][7]\n"
        "except IndexError as error:\n    raise E('GMR-506', 'train raised IndexError') from error\n"
    )
    result = CliRunner().invoke(run, [str(script)])
    assert result.exit_code == 2
    trace, _, message = result.output.partition("\n\nGMR-506")
    assert "line 3" in trace and "[][7]" in trace and "IndexError: list index out of range" in trace
    assert message.startswith(" train raised IndexError") and "fedgmr_plugin" not in trace


def test_run_refuses_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fedgmr"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert CliRunner().invoke(run, [str(tmp_path / "main.py")]).exit_code == 2
    (tmp_path / "main.py").write_text("raise AssertionError('the script must not start')\n")
    result = CliRunner().invoke(run, [str(tmp_path / "main.py"), "--cf", str(tmp_path / "no.yaml")])
    assert result.exit_code == 2 and result.output.startswith("GMR-108 --cf ")


def test_module_form_runs_a_script_or_the_command_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "main.py"
    assert (
        not entry.is_script([])
        and not entry.is_script([str(script)])
        and not entry.is_script([str(tmp_path)])
    )
    script.write_text("import sys; print(sys.argv[1:])\n")
    assert entry.is_script([str(script), "--cf"]) and not entry.is_script(["run", str(script)])
    monkeypatch.setattr(sys, "argv", ["fedgmr_plugin", str(script), "--cf", "c.yaml"])
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 0 and capsys.readouterr().out == "['--cf', 'c.yaml']\n"


def test_module_form_without_a_script_is_the_command_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedgmr_plugin", "doctor", "--help"])
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 0 and "python -m fedgmr_plugin doctor" in capsys.readouterr().out


def test_the_command_is_noted_where_it_can_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for argv, spec, told, script in (
        (["main.py", "--cf", "c"], None, None, str(tmp_path / "main.py")),
        (["sub/main.py"], None, None, str(tmp_path / "sub" / "main.py")),
        (["/bin/fedgmr", "demo"], None, None, ""),
        (["/x/__main__.py", "demo"], object(), None, ""),
        (["", "--cf"], None, None, ""),
        (["main.py"], object(), "main.py", str(tmp_path / "main.py")),
    ):
        monkeypatch.setattr(command, "_noted", [])
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
        command.note(told)
        command.note("another.py")
        assert command.next_run() == (script, argv[1:], str(tmp_path), 1)
        assert command.next_run().run == 2


def test_a_key_of_fedmls_defences_is_no_slip() -> None:
    sections = {"train_args": {"federated_optimizer": "fedgmr", "norm_bound": 1.0}}
    assert [note.split()[0] for note in registration.notes(sections)] == ["norm_bound"]
    defended = {**sections, "security_args": {"enable_defense": True, "defense_type": "norm_diff_clipping"}}
    assert registration.notes(defended) == []
