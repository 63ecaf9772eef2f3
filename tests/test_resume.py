"""Checkpoints, and runs that go on from them to the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from fedgmr_plugin.cli import main
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.errors import ConfigError, RunLogError
from fedgmr_plugin.protocol import checkpoint
from fedgmr_plugin.protocol.runlog import LOG_NAME, RunLogWriter, read_run
from fedgmr_plugin.runtimes import command, registration, resume
from fedgmr_plugin.runtimes import run as run_module

# -- files -------------------------------------------------------------------------------------------


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(50, generator=generator),
        "rungs": torch.randint(0, 5, (50,), generator=generator, dtype=torch.int16),
        "empty": torch.zeros(0),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
    }


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    meta = {"window": 7, "best": 0.1 + 0.2, "nothing": None, "name": "é", "bad": float("-inf")}
    path = checkpoint.save(tmp_path, 7, meta, tensors(0))
    assert path.parent == tmp_path / "checkpoints" and path.name.startswith("00000007-")
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.meta == meta and found.path == path
    assert found.tensors.keys() == tensors(0).keys()
    for name, tensor in tensors(0).items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)


def test_two_generations_are_kept_and_the_older_one_serves_where_the_last_is_damaged(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for window in (1, 5, 12):
        checkpoint.save(tmp_path, window, {"window": window}, tensors(window))
    folder = tmp_path / "checkpoints"
    (folder / "draft").write_bytes(b"what a killed process left")
    (folder / "notes.txt").write_text("the user's own")
    names = sorted(p.name for p in folder.iterdir())
    assert [name[:8] for name in names] == ["00000005", "00000012", "draft", "notes.tx"]
    last = folder / names[1]
    whole = last.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        last.write_bytes(damaged)
        found = checkpoint.latest(tmp_path)
        assert found is not None and found.meta == {"window": 5}
    (folder / names[0]).write_bytes(b"")
    last.write_bytes(b"")
    with pytest.raises(
        RunLogError, match=r"GMR-605 00000012-\w+.safetensors: ValueError: the content is not"
    ):
        checkpoint.latest(tmp_path)


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_sound_one(tmp_path: Path) -> None:
    for window in (5, 12):
        last = checkpoint.save(tmp_path, window, {"window": window}, tensors(window))
    for window in (13, 14):  # each time the last one is damaged, and the run goes on from the one before
        last.write_bytes(b"damaged")
        found = checkpoint.latest(tmp_path)
        assert found is not None and found.meta == {"window": 5}
        last = checkpoint.save(tmp_path, window, {"window": window}, tensors(window))


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", "fedgmr checkpoint 9")
    checkpoint.save(tmp_path, 1, {}, tensors(0))
    monkeypatch.undo()
    with pytest.raises(RunLogError, match="GMR-605 .*: its format is 'fedgmr checkpoint 9'"):
        checkpoint.latest(tmp_path)


def test_a_log_that_lost_what_a_checkpoint_relies_on_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_text("{}\n")
    with pytest.raises(RunLogError, match="GMR-602 it lost bytes: 100 were written"):
        RunLogWriter(tmp_path, resume_at=100)
    assert (tmp_path / LOG_NAME).read_text() == "{}\n"


# -- runs --------------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    registration.register()
    yield
    registration.unregister()


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 16),
            nn.BatchNorm1d(16),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(16, 12),
            nn.Linear(12, 3),
        )


def build(
    folder: Path, seed: int = 3, size: int = 25, keys: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A run of twelve windows, not started."""
    from fedml.simulation import SimulatorSingleProcess

    args = SimpleNamespace(
        training_type="simulation", backend="sp", federated_optimizer="fedgmr", random_seed=seed,
        dataset="synthetic", client_num_in_total=4, client_num_per_round=3, comm_round=12, epochs=1,
        batch_size=5, client_optimizer="sgd", learning_rate=0.2, weight_decay=0.01, frequency_of_the_test=2,
        using_gpu=False, enable_wandb=False, using_mlops=False, rank=0, run_id="0",
        fedgmr_args={
            "interval": 2, "output_dir": str(folder), "run_name": "run", "progress": False,
            "densities": [1.0, 0.5, 0.2, 0.1], "patience": 1, "checkpoint_seconds": 0.0, **options,
        },
        **(keys or {}),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)

    def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        x = torch.randn(count, 6, generator=generator)
        y = x[:, :3].argmax(dim=1)
        return [(x[i : i + 5], y[i : i + 5]) for i in range(0, count, 5)]

    train = {n: batches(size) for n in range(4)}
    test = {n: batches(10) for n in range(4)}
    counts = dict.fromkeys(range(4), size)
    data = [4 * size, 40, batches(10), batches(40), counts, train, test, 3]
    return SimulatorSingleProcess(args, "cpu", data, network()).fl_trainer


def again(folder: Path, **options: Any) -> Any:
    """The same run, to go on in its directory."""
    with resume.resuming(folder / "run"):
        return build(folder, **options)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_noted", [])


def killed_after(run: Any, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until so many windows are over, and stop in the middle of the next."""
    step, done = Simulation._take_in, []

    def take_in(self: Simulation, window: Any) -> Any:
        effects = step(self, window)
        if len(done) == windows:
            raise Killed
        done.append(window)
        return effects

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "_take_in", take_in)
        with pytest.raises(Killed):
            run.train()


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "run" / LOG_NAME).read_text().splitlines()]
    found[-1].pop("wall_seconds")
    for key in ("output_dir", "workers", "checkpoint_seconds"):
        found[0]["config"].pop(key)
    return found


WAYS: list[dict[str, Any]] = [
    {},
    {"update_scope": "buffer", "update_form": "replacement", "staleness": "constant"},
    {"score": "weight_change", "trigger": "time"},
    {"score": "random", "schedule": "sync", "aggregation": "global_average"},
    {"payload_rule": "encoded", "payload_dtype": "bfloat16"},
    {"probe": True, "probe_interval": 1},
    {"trigger": "gradient"},
    {"trigger": "mixed", "density_step": "fixed", "warmup_windows": 6, "evaluate": "validation"},
    {"workers": 2},
    {"batch_clients": 3},
]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("options", WAYS, ids=lambda options: ",".join(options) or "default")
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice, and the second time before anything new was saved; every record is there once."""
    whole = build(tmp_path / "whole", **{**options, "checkpoint_seconds": None})
    whole.train()
    assert not (tmp_path / "whole" / "run" / "checkpoints").exists()

    folder = tmp_path / "parts"
    killed_after(build(folder, **options), 5, monkeypatch)
    killed_after(again(folder, **options), 0, monkeypatch)
    killed_after(again(folder, **options), 3, monkeypatch)
    last = again(folder, **options)
    last.train()
    assert last.end["model_sha256"] == whole.end["model_sha256"]
    assert lines(folder) == lines(tmp_path / "whole")
    restored = {r["client"] for r in read_run(folder / "run").records("restoration")}
    assert restored or options.get("trigger") == "gradient" or options.get("schedule") == "sync"


@pytest.mark.usefixtures("registered")
def test_the_number_of_workers_may_change_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path / "whole")
    whole.train()
    killed_after(build(tmp_path / "parts", workers=2), 4, monkeypatch)
    last = again(tmp_path / "parts", workers=1)
    last.train()
    assert last.end["model_sha256"] == whole.end["model_sha256"]


@pytest.mark.usefixtures("registered")
def test_without_a_checkpoint_the_run_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path / "whole")
    whole.train()
    killed_after(build(tmp_path / "parts", checkpoint_seconds=1e9), 5, monkeypatch)
    again(tmp_path / "parts").train()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.usefixtures("registered")
def test_a_run_that_another_release_began_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log is of another minor schema, and does not name the device."""
    whole = build(tmp_path / "whole")
    whole.train()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "SCHEMA", "1.1")
        patch.setattr(run_module, "device_name", lambda device: None)
        killed_after(build(tmp_path / "parts"), 5, patch)
    last = again(tmp_path / "parts")
    last.train()
    assert last.end["model_sha256"] == whole.end["model_sha256"]
    assert read_run(tmp_path / "parts" / "run").header["schema"] == "1.1"
    assert read_run(tmp_path / "whole" / "run").header["device"].startswith("cpu: ")


@pytest.mark.usefixtures("registered")
def test_another_run_than_the_interrupted_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(build(tmp_path), 5, monkeypatch)
    before = (tmp_path / "run" / LOG_NAME).read_bytes()
    for changed, message in (
        ({"seed": 4}, "seed: 3 became 4; random_seed: 3 became 4\n"),
        ({"size": 20}, r"client_samples: \[23, 23, 23, 23\] became \[18, 18, 18, 18\]\n"),
        (
            {"patience": 2, "trigger": "time"},
            'fedgmr_args.trigger: "plateau" became "time"; fedgmr_args.pat',
        ),
    ):
        with pytest.raises(RunLogError, match=f"GMR-606 {message}") as refusal:
            again(tmp_path, **changed).train()
        assert refusal.value.where == str(tmp_path / "run")
    assert (tmp_path / "run" / LOG_NAME).read_bytes() == before


@pytest.fixture
def fresh_singletons() -> Iterator[None]:
    """FedML keeps defences and privacy per process."""
    from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy
    from fedml.core.security.fedml_defender import FedMLDefender

    yield
    FedMLDefender._defender_instance = None
    FedMLDifferentialPrivacy._dp_instance = None


@pytest.mark.usefixtures("registered", "fresh_singletons")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epsilon": 0.9}, "epsilon: 0.5 became 0.9\n"),
        ({"enable_dp": False}, 'enable_dp: true became null; dp_solution_type: "cdp" became null; '),
        (
            {"enable_defense": True, "defense_type": "crfl"},
            "enable_defense: null became true; defense_type: ",
        ),
    ],
)
def test_a_run_does_not_go_on_with_less_privacy_or_another_defence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    """FedML's options of both are in the log's header and in config.yaml; what is off is in neither."""
    private = {
        "enable_dp": True, "dp_solution_type": "cdp", "mechanism_type": "gaussian", "epsilon": 0.5,
        "delta": 1e-5, "sensitivity": 1e-3, "clipping_norm": None, "clip_threshold": 1.0,
    }  # fmt: skip
    killed_after(build(tmp_path, keys={**private, "defense_type": "krum"}), 5, monkeypatch)
    header = read_run(tmp_path / "run").header["fedml"]
    assert header.items() >= private.items() and not header.keys() & {"enable_defense", "defense_type"}
    with pytest.raises(RunLogError, match=f"GMR-606 .*{message}"):
        again(tmp_path, keys={**private, "defense_type": "krum", **changed}).train()
    again(tmp_path, keys={**private, "defense_type": "krum"}).train()
    plain = build(tmp_path / "plain", keys={**private, "enable_dp": False})
    assert not plain.header["fedml"].keys() & private.keys()


@pytest.mark.usefixtures("registered")
def test_what_cannot_be_resumed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer() -> str:
        result = CliRunner().invoke(main, ["resume", str(tmp_path / "run")])
        assert result.exit_code == 2
        return result.output

    killed_after(build(tmp_path), 2, monkeypatch)
    noted = tmp_path / "run" / "command.json"
    script = tmp_path / "main.py"
    good = {"script": str(script), "arguments": [], "folder": str(tmp_path), "run": 1}
    for changes, message in (
        ({"script": ""}, "no script started it"),
        ({}, "is no Python file"),
        ({"script": 5}, "is not what fedgmr writes"),
        ({"arguments": "--cf a"}, "is not what fedgmr writes"),
        ({"arguments": [1]}, "is not what fedgmr writes"),
        ({"run": None}, "is not what fedgmr writes"),
        ({"more": 1}, "command.json cannot be read"),
        ({"run": 2, "script": __file__}, "it was run 2 of its script"),
        ({"folder": str(tmp_path / "gone"), "script": __file__}, "is gone"),
    ):
        noted.write_text(json.dumps({**good, **changes}))
        assert "GMR-604" in (said := answer()) and message in said
    noted.write_text("[]")
    assert "GMR-604 command.json cannot be read" in answer()
    noted.unlink()
    assert "GMR-604 command.json cannot be read" in answer()
    again(tmp_path).train()
    assert "GMR-604 the run is finished" in answer()
    with pytest.raises(RunLogError, match="GMR-604 the run is finished"):
        again(tmp_path).train()
    (tmp_path / "run" / LOG_NAME).unlink()
    assert "GMR-601" in answer()


@pytest.mark.usefixtures("registered")
def test_only_the_first_run_of_a_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that trains two: the second is itself again, and is never taken for the first."""
    killed_after(build(tmp_path / "one"), 3, monkeypatch)
    killed_after(build(tmp_path / "two"), 3, monkeypatch)
    commands = [json.loads((tmp_path / n / "run" / "command.json").read_text()) for n in ("one", "two")]
    assert [c["run"] for c in commands] == [1, 2]
    with resume.resuming(tmp_path / "one" / "run"):
        first, second = build(tmp_path / "one"), build(tmp_path / "three")
    assert first.resumed and not second.resumed
    assert second.directory == tmp_path / "three" / "run"


@pytest.mark.usefixtures("registered")
def test_a_directory_that_somebody_trains_in_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(build(tmp_path), 3, monkeypatch)
    before = (tmp_path / "run" / LOG_NAME).read_bytes()
    run = again(tmp_path)
    with resume.locked(tmp_path / "run"), pytest.raises(RunLogError, match="GMR-604 another process trains"):
        run.train()
    assert (tmp_path / "run" / LOG_NAME).read_bytes() == before


@pytest.mark.usefixtures("registered")
def test_a_checkpoint_of_another_log_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed's, put beside this run's own."""
    whole = build(tmp_path / "whole")
    whole.train()
    killed_after(build(tmp_path / "other", seed=4), 7, monkeypatch)
    killed_after(build(tmp_path / "parts"), 4, monkeypatch)
    mine, others = (tmp_path / name / "run" / "checkpoints" for name in ("parts", "other"))
    for path in others.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    last = again(tmp_path / "parts")
    last.train()
    assert last.end["model_sha256"] == whole.end["model_sha256"]

    killed_after(build(tmp_path / "lost"), 4, monkeypatch)
    for path in (tmp_path / "lost" / "run" / "checkpoints").iterdir():
        path.unlink()
    for path in others.iterdir():
        (tmp_path / "lost" / "run" / "checkpoints" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RunLogError, match="GMR-605 .* it is not of this log"):
        again(tmp_path / "lost").train()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"type": "wind', b"garbage\n{}\n"])
def test_what_a_crash_left_behind_the_checkpoint_does_not_matter(
    tail: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(tmp_path / "whole")
    whole.train()
    killed_after(build(tmp_path / "parts"), 4, monkeypatch)
    with (tmp_path / "parts" / "run" / LOG_NAME).open("ab") as log:
        log.write(tail)
    again(tmp_path / "parts").train()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.usefixtures("registered")
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = build(tmp_path)
    run.train()
    assert run.end is not None and "no checkpoint of window 1: [Errno 28]" in caplog.text
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.usefixtures("registered")
def test_the_log_ends_when_the_model_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose model could not be written is not finished, and can be resumed."""
    from fedgmr_plugin.runtimes import recorded

    whole = build(tmp_path / "whole")
    whole.train()
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "save_file", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(tmp_path / "parts").train()
    assert not (tmp_path / "parts" / "run" / "model.safetensors").exists()
    again(tmp_path / "parts").train()
    saved = [(tmp_path / name / "run" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert saved[0] == saved[1] and lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.usefixtures("registered")
def test_a_name_whose_checkpoints_are_there_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="GMR-110"):
        build(tmp_path)


def test_a_killed_process_is_resumed_by_the_command(tmp_path: Path) -> None:
    """SIGKILL while it trains; `fedgmr resume` from another folder gives what an undisturbed run gives."""
    command = [sys.executable, "-m", "fedgmr_plugin"]
    subprocess.run([*command, "new", "project"], cwd=tmp_path, check=True, capture_output=True)
    project = tmp_path / "project"
    text = (
        (project / "fedml_config.yaml")
        .read_text()
        .replace("fedgmr_args:", "fedgmr_args:\n  checkpoint_seconds: 0")
    )
    (project / "fedml_config.yaml").write_text(text.replace("comm_round: 150", "comm_round: 30"))
    start = [*command, "main.py", "--cf", "fedml_config.yaml"]

    def sha(output: str) -> str:
        return next(line for line in output.splitlines() if line.startswith("model sha256"))

    captured: dict[str, Any] = {"check": True, "capture_output": True, "text": True}
    whole = subprocess.run(start, cwd=project, **captured)
    process = subprocess.Popen(start, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = project / "fedgmr_runs" / "run-002"
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints").glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_run(run).end is None
    done = subprocess.run([*command, "resume", str(run)], cwd=tmp_path, **captured)
    assert sha(done.stdout) == sha(whole.stdout)
    assert read_run(run).count("window") == 30
