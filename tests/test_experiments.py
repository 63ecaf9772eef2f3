"""`fedgmr bench`: experiments from files, in processes, resumed, compared."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from benchmarks.collect import beside_the_paper, collect, horizons, table
from benchmarks.data import DataSpec
from fedgmr_plugin.cli import main
from fedgmr_plugin.config import ConfigRefused
from fedgmr_plugin.errors import ConfigError, RunLogError
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes.campaign import Campaign, Status
from fedgmr_plugin.runtimes.experiment import Experiment, load
from fedgmr_plugin.runtimes.resume import locked

#: A problem of the user's own, as a module beside the experiment.
PROBLEM = """
import time
import torch
from torch import nn
from fedgmr_plugin.datasets import digits

class Slow(nn.Sequential):
    def forward(self, x):
        time.sleep(self.pause)
        return super().forward(x)

def build(seed, *, clients=4, pause=0.0, fails=()):
    if seed in fails:
        raise RuntimeError("no such data")
    torch.manual_seed(seed)
    model = Slow(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    model.pause = pause
    return digits(clients, None, seed, 20), model
"""
CONTENT: dict[str, Any] = {
    "title": "Digits, perceptron",
    "problem": "my_problem:build",
    "with": {"clients": 4},
    "train_args": {"client_num_in_total": 4, "client_num_per_round": 4, "batch_size": 20},
    "fedgmr_args": {
        "densities": [1.0, 0.5, 0.5, 0.2],
        "model_megabytes": 26.0,
        "time_budget": 120.0,
        "evaluation_seconds": 20.0,
        "interval": 5,
    },
    "methods": {"fedgmr": {"method": "fedgmr"}, "fedavg": {"method": "fedavg"}},
    "seeds": [1, 2],
    "last": 2,
    "against": "fedavg",
    "reduced": {"fedgmr_args": {"time_budget": 60.0}, "seeds": [1]},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> Path:
    (tmp_path / "my_problem.py").write_text(PROBLEM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), str(tmp_path)]))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_problem", None)
    return tmp_path


def written(place: Path, **changes: Any) -> Path:
    file = place / "digits.yaml"
    file.write_text(yaml.safe_dump({**CONTENT, **changes}, sort_keys=False))
    return file


def test_all_runs_then_a_table_and_a_report(place: Path) -> None:
    file = written(place, notes="The rate is < 1, by guess.")
    result = CliRunner().invoke(main, ["bench", str(file), "--jobs", "2", "-o", "out"])
    assert result.exit_code == 0, result.output
    out = place / "out"
    for method in ("fedgmr", "fedavg"):
        for seed in (1, 2):
            log = read_run(out / f"{method}-{seed}")
            assert log.end is not None and log.header["seed"] == seed
            assert log.header["config"]["method"] == method
            ends = [0.0, *(w["end"] for w in log.records("window"))]
            due = [end for start, end in pairwise(ends) if end // 20 > start // 20]
            assert [e["time"] for e in log.records("evaluation")] == due and len(due) > 3
    lines = [line for line in result.output.splitlines() if "±" in line]
    assert [line.split()[0] for line in lines] == ["fedgmr", "fedavg"]
    assert "difference: points above fedavg; paired by seed" in result.output
    page = (out / "report.html").read_text()
    assert "120 virtual seconds planned" in page and "windows planned" not in page
    assert (
        "points" in page
        and "The rate is &lt; 1, by guess." in page
        and "fedavg" in (out / "table.csv").read_text()
    )
    assert r"\toprule" in (out / "table.tex").read_text()

    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [(row["group"], row["evaluations"], row["against"]) for row in rows] == [
        ("fedgmr", "2", "fedavg"),
        ("fedavg", "2", ""),
    ]
    ends_of = [
        [e["accuracy"] for e in read_run(out / f"fedavg-{n}").records("evaluation")][-2:] for n in (1, 2)
    ]
    assert float(rows[1]["accuracy_mean"]) == pytest.approx(sum(map(sum, ends_of)) / 4)
    assert "means of the last 2 evaluations" in page and "(as asked for)" in page

    (out / "fedgmr-1" / "theory.json").write_text("{}")
    assert CliRunner().invoke(main, ["bench", str(file), "-o", "out"]).exit_code == 0
    assert "theory.json is not what" in (out / "report.html").read_text()

    norms = [read_run(run).records("dispatch")[0]["full_norm_sq"] for run in sorted(out.glob("*-*/"))]
    assert norms[0] == norms[2] != norms[1] == norms[3]  # weights follow the seed, not the method

    figures = collect(out)
    assert [(run["method"], run["seed"]) for run in figures["runs"]] == [
        (method, seed) for method in ("fedgmr", "fedavg") for seed in (1, 2)
    ]
    for run in figures["runs"]:
        evaluations = read_run(out / f"{run['method']}-{run['seed']}").records("evaluation")
        assert run["accuracy"] == pytest.approx(sum(e["accuracy"] for e in evaluations[-2:]) / 2)
    rows = table(json.loads(json.dumps(figures))).splitlines()
    assert rows[2].startswith("| fedgmr | 2 |") and rows[3].startswith("| fedavg | 2 |")

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/run.jsonl")}
    again = CliRunner().invoke(main, ["bench", str(file), "-o", "out", "--list"])
    assert again.output.count("finished") == 4
    again = CliRunner().invoke(main, ["bench", str(file), "-o", "out"])
    assert again.exit_code == 0 and {p: p.stat().st_mtime_ns for p in before} == before

    shutil.rmtree(out / "fedgmr-2")
    assert [run["accuracy"] for run in collect(out, figures)["runs"]] == [
        run["accuracy"] for run in figures["runs"]
    ]
    with pytest.raises(ValueError, match="another experiment"):
        collect(out, {**figures, "experiment": {**figures["experiment"], "last": 3}})


def test_figures_of_some_methods_without_the_reference(place: Path) -> None:
    """No number where nothing is compared; `fedavg` has no runs of a method `fedavg-2`."""
    several = {"fedavg": {"method": "fedavg"}, "fedavg-2": {"method": "fedavg"}, "fedgmr": {}}
    rounds = {k: v for k, v in CONTENT["fedgmr_args"].items() if k != "time_budget"}
    keys = {**CONTENT["train_args"], "comm_round": 4}
    file = written(place, methods=several, against="fedgmr", fedgmr_args=rounds, train_args=keys)
    options = ["--methods", "fedavg,fedavg-2", "--seeds", "1", "-o", "out"]
    assert CliRunner().invoke(main, ["bench", str(file), *options]).exit_code == 0
    figures = json.loads(json.dumps(collect(place / "out")))
    assert [(run["method"], run["seed"]) for run in figures["runs"]] == [("fedavg", 1), ("fedavg-2", 1)]
    assert "nan" not in table(figures) + beside_the_paper(figures, "femnist")
    assert table(figures).splitlines()[2].split(" | ")[3:5] == ["", ""]
    assert horizons(figures).splitlines()[2].endswith(f" {100 * figures['runs'][0]['curve'][-1][1]:.1f} |")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere"], "No such file or directory: 'nowhere/experiment.json'"),
        (["--table", "none.json"], "No such file or directory: 'none.json'"),
        (["empty"], "empty has no finished run of its experiment"),
    ],
)
def test_what_cannot_be_collected_is_told(place: Path, options: list[str], said: str) -> None:
    (place / "empty").mkdir()
    text = load(written(place)).model_dump_json(by_alias=True)
    (place / "empty" / "experiment.json").write_text(text)
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.collect", *options], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2 and said in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_goes_on_to_the_same_bits(place: Path, how: signal.Signals) -> None:
    slow = {
        "with": {"clients": 4, "pause": 0.02},
        "fedgmr_args": {**CONTENT["fedgmr_args"], "time_budget": 200.0, "checkpoint_seconds": 0.0},
    }
    file = written(place, **slow)
    command = [
        sys.executable,
        "-m",
        "fedgmr_plugin",
        "bench",
        str(file),
        "--methods",
        "fedgmr",
        "--seeds",
        "1",
    ]
    process = subprocess.Popen(
        [*command, "-o", "cut"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where tests run in the background
    )
    checkpoints = place / "cut" / "fedgmr-1" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in said
    with locked(place / "cut" / "fedgmr-1"):  # nobody trains it any more
        assert read_run(place / "cut" / "fedgmr-1").end is None
    for folder in ("cut", "whole"):
        subprocess.run([*command, "-o", folder], check=True, capture_output=True, timeout=300)
    ends = [read_run(place / folder / "fedgmr-1").end for folder in ("cut", "whole")]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0]["model_sha256"] == ends[1]["model_sha256"]
    assert not list(place.glob("cut/*.old*"))


def test_whom_the_best_is_compared_with_is_told(place: Path) -> None:
    """Where the experiment's reference has not run."""
    methods = {"fedgmr": {}, "frozen": {"trigger": "none"}, "fedavg": {"method": "fedavg"}}
    file = written(place, methods=methods)
    options = ["--methods", "fedgmr,frozen", "--budget", "50", "-o", "out"]
    result = CliRunner().invoke(main, ["bench", str(file), *options])
    assert result.exit_code == 0, result.output
    assert re.search("points above (fedgmr|frozen), the best mean, chosen after the fact", result.output)


def test_a_run_of_other_options_is_moved_aside(place: Path) -> None:
    file, options = written(place), ["--reduced", "--methods", "fedgmr", "-o", "out"]
    assert CliRunner().invoke(main, ["bench", str(file), *options]).exit_code == 0
    first = (place / "out" / "fedgmr-1" / "run.jsonl").read_bytes()
    changed = CliRunner().invoke(main, ["bench", str(file), *options, "--set", "fedgmr_args.patience=9"])
    assert changed.exit_code == 0, changed.output
    assert (place / "out" / "fedgmr-1.old1" / "run.jsonl").read_bytes() == first
    assert read_run(place / "out" / "fedgmr-1").header["config"]["patience"] == 9
    other = CliRunner().invoke(main, ["bench", str(file), *options, "--list", "--set", "with.pause=0.0"])
    assert other.output.split() == ["to", "run", "fedgmr-1"]  # another problem is another run


def test_an_interrupted_run_of_another_problem_is_not_gone_on_with(place: Path) -> None:
    file, options = written(place), ["--reduced", "--methods", "fedavg", "-o", "out"]
    assert CliRunner().invoke(main, ["bench", str(file), *options]).exit_code == 0
    log = place / "out" / "fedavg-1" / "run.jsonl"
    cut = b"".join(log.read_bytes().splitlines(keepends=True)[:-3])
    log.write_bytes(cut)
    other = CliRunner().invoke(main, ["bench", str(file), *options, "--set", "with.pause=0.0"])
    assert other.exit_code == 0, other.output
    assert (place / "out" / "fedavg-1.old1" / "run.jsonl").read_bytes() == cut


def test_what_is_finished_depends_on_keys_that_are_left_out_too(place: Path) -> None:
    file, options = written(place), ["--reduced", "--methods", "fedavg", "-o", "out"]
    other = ["--set", "train_args.weight_decay=0.1"]
    assert CliRunner().invoke(main, ["bench", str(file), *options, *other]).exit_code == 0
    listed = CliRunner().invoke(main, ["bench", str(file), *options, "--list"])
    assert listed.output.split() == ["to", "run", "fedavg-1"]
    listed = CliRunner().invoke(main, ["bench", str(file), *options, *other, "--list"])
    assert listed.output.split() == ["finished", "fedavg-1"]


def test_what_is_named_twice_runs_once(place: Path) -> None:
    options = ["--methods", "fedavg,fedavg", "--seeds", "1,2,1", "--list"]
    listed = CliRunner().invoke(main, ["bench", str(written(place)), *options])
    assert listed.output.split("\n")[:-1] == ["to run    fedavg-1", "to run    fedavg-2"]


def test_two_campaigns_do_not_share_a_folder(place: Path) -> None:
    """The second would rewrite what the processes of the first read."""
    file, out = written(place), place / "out"
    out.mkdir()
    with locked(out):
        result = CliRunner().invoke(main, ["bench", str(file), "-o", str(out)])
    assert result.exit_code == 2 and "GMR-604 another campaign works in this folder" in result.output
    assert "name another folder with `-o`" in result.output and not list(out.iterdir())


def test_a_folder_that_cannot_be_written_to(place: Path) -> None:
    (place / "out" / "experiment.json").mkdir(parents=True)
    result = CliRunner().invoke(main, ["bench", str(written(place)), "-o", "out"])
    assert result.exit_code == 2 and re.search("GMR-110 .*out cannot be used: Is a dir", result.output)


def test_a_failed_run_is_told_and_other_seeds_go_on(place: Path) -> None:
    """Methods of a seed share its data: where one has none, the others are not tried."""
    file = written(place, **{"with": {"clients": 4, "fails": [2, 3]}}, seeds=[1, 2, 3])
    result = CliRunner().invoke(main, ["bench", str(file), "--budget", "50", "--jobs", "1", "-o", "out"])
    assert result.exit_code == 1
    assert "fedgmr-2, fedgmr-3 failed; the end of" in result.output
    assert result.output.count("RuntimeError: no such data") == 1
    assert "fedavg-2, fedavg-3 not begun" in result.output
    assert "2 of 6 runs, 4 failed" in result.output
    assert re.search(r"fedavg-1 +1 +\d", result.output)


def test_what_ended_a_run_that_was_killed_is_told(place: Path) -> None:
    (place / "hungry.py").write_text("import os\n\ndef build(seed):\n    os.kill(os.getpid(), 9)\n")
    file = written(place, problem="hungry:build", **{"with": {}})
    result = CliRunner().invoke(main, ["bench", str(file), "--reduced", "--methods", "fedavg", "-o", "out"])
    assert result.exit_code == 1 and "fedavg-1 failed" in result.output
    assert "ended by signal 9: Killed (out of memory?" in result.output


def test_a_wrong_number_of_clients_is_told_once(place: Path) -> None:
    result = CliRunner().invoke(
        main, ["bench", str(written(place, **{"with": {"clients": 3}})), "--jobs", "1", "-o", "out"]
    )
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert result.output.count("GMR-302 client_num_in_total=4, but the dataset has 3 clients") == 1
    assert "train_args" in result.output


def test_runs_end_with_a_campaign_that_is_killed(place: Path) -> None:
    file = written(place, **{"with": {"clients": 4, "pause": 0.02}})
    command = [sys.executable, "-m", "fedgmr_plugin", "bench", str(file), "--jobs", "1", "-o", "out"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    log = place / "out" / "fedgmr-1" / "run.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while True:
        try:
            with locked(log.parent):
                break  # nobody trains it any more
        except RunLogError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert read_run(log).end is None


@pytest.mark.parametrize("first", [b"no JSON\n", b"{}\n", b"[1]\n", b"\xff\n"])
def test_a_run_whose_log_is_damaged_is_moved_aside(place: Path, first: bytes) -> None:
    file, options = written(place), ["--reduced", "--methods", "fedavg", "-o", "out"]
    log = place / "out" / "fedavg-1" / "run.jsonl"
    log.parent.mkdir(parents=True)
    log.write_bytes(first + b'{"type": "end"}\n')
    (log.parent / "problem.json").write_text(
        json.dumps({"problem": "my_problem:build", "with": {"clients": 4}})
    )
    listed = CliRunner().invoke(main, ["bench", str(file), *options, "--list"])
    assert listed.output.split() == ["to", "run", "fedavg-1"]
    if first == b"{}\n":
        assert CliRunner().invoke(main, ["bench", str(file), *options]).exit_code == 0
        assert (place / "out" / "fedavg-1.old1" / "run.jsonl").read_bytes().startswith(first)


def test_progress_is_read_from_the_logs(place: Path) -> None:
    experiment = load(written(place))
    told: list[Status] = []
    campaign = Campaign(experiment, place / "out", ["fedavg"], [1], 1, told.append)
    campaign.run()
    assert not campaign.failed and told[-1] == Status(1, 1, 0, (), 0.0)
    assert [status.done for status in told].count(1) == 1  # a terminal's line ends once
    shares = [share for status in told for _, share in status.running]
    assert all(0 <= share <= 1 for share in shares)
    assert [run.name for run in campaign.runs()] == ["fedavg-1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"a": {"method": "fedavgg"}}}, r"GMR-103.*digits.yaml: methods.a.method"),
        ({"methods": {"a": {"patience": "x"}, "b": {"interval": 0}}}, r"GMR-100 2 problems"),
        ({"train_args": {"batchsize": 3}}, "GMR-101 batchsize is not a key of train_args"),
        ({"train_args": {"learning_rate": "fast"}}, "GMR-102 learning_rate='fast' is not a number"),
        ({"methods": {"a/b": {"method": "fedavg"}}}, "GMR-104 run_name='a/b-1' is no name"),
        ({"fedgmr_args": {}}, "GMR-107 neither time_budget nor comm_round"),
        ({"against": "fedprox", "methods": {"fedavg": {"method": "fedavg"}}}, "GMR-103 against=fedprox"),
        ({"problem": "nowhere:build"}, "GMR-113 problem=nowhere:build cannot be imported"),
        (
            {"problem": "benchmarks.problems:bild"},
            "GMR-113 .*problems has no 'bild'.*Did you mean `benchmarks.problems:build`",
        ),
        ({"tittle": "x"}, "GMR-101 tittle is not a key.*digits.yaml: tittle.*Did you mean `title`"),
        ({"arguments": {}}, "GMR-101 arguments is not a key.*Its keys are title, problem, with,"),
        ({"title": 2024}, 'GMR-102 title=2024 is a whole number; it must be text.*"2024"'),
        ({"problem": 3}, "GMR-102 problem=3 .* text such as `benchmarks.problems:build`"),
        ({"problem": "nowhere"}, 'GMR-102 problem="nowhere" has another form.*digits.yaml: problem'),
        ({"with": 3}, "GMR-102 with=3 is a whole number; it must be a section"),
        ({"with": {1: 2}}, "GMR-102 a key of with=1 is a whole number; it must be text"),
        (
            {"with": {"client": 4}},
            "GMR-101 client is not an argument of my_problem:build.*with.client.*Did you mean `clients`",
        ),
        (
            {"problem": "benchmarks.problems:build", "with": {"data": {}}},
            "GMR-107 benchmarks.problems:build: missing .*'model'.*arguments are data, model, clients",
        ),
        ({"methods": {}}, "GMR-104 methods={} has too few elements.*at least 1 key"),
        ({"methods": {"a": 3}}, "GMR-102 methods.a=3 .*must be a section.*digits.yaml: methods.a"),
        ({"seeds": 3}, r"GMR-102 seeds=3 .*Write a list: \[3\]"),
        ({"seeds": []}, r"GMR-104 seeds=\[\] has too few elements"),
        ({"seeds": [1, "2"]}, r"^GMR-102 seeds\[1\]=\"2\" is text.*Write 2 without quotes"),
        ({"seeds": [True]}, r"^GMR-102 seeds\[0\]=true is a boolean"),
        ({"seeds": [-1]}, r"GMR-104 seeds\[0\]=-1 is outside \[0, inf\)"),
        ({"last": 0}, r"GMR-104 last=0 is outside \[1, inf\)"),
        ({"last": 2.0}, "GMR-102 last=2.0 is a fraction.*Write 2"),
        ({"notes": None}, "GMR-102 notes=null is empty"),
        ({"train_args": {"batchsize": 3}}, "digits.yaml: train_args.batchsize.*Did you mean `batch_size`"),
        ({"train_args": {"learning_rate": "fast"}}, "digits.yaml: train_args.learning_rate"),
        ({"against": "fedav"}, "GMR-103 against=fedav .*digits.yaml: against.*Did you mean `fedavg`"),
        ({"reduced": {"last": 3}}, "GMR-101 last cannot be changed there.*What can be is with, train_args"),
    ],
)
def test_what_is_wrong_with_a_file(place: Path, changes: dict[str, Any], message: str) -> None:
    if set(changes) == {"fedgmr_args"}:
        changes["methods"] = {"a": {"method": "fedavg"}}
        changes["against"] = "a"
    elif "methods" in changes and "against" not in changes:
        changes["against"] = None
    options = ["--reduced"] if "reduced" in changes else []
    result = CliRunner().invoke(main, ["bench", str(written(place, **changes)), "-o", "out", *options])
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output, re.DOTALL), result.output
    assert "docs/errors.md#gmr-1" in result.output
    assert not re.search("Input should|Field required|not permitted|validation", result.output)
    assert not (place / "out").exists()


def test_what_a_file_lacks_is_told_at_once(place: Path) -> None:
    (place / "empty.yaml").write_text("seeds: [1]\n3: x")
    result = CliRunner().invoke(main, ["bench", "empty.yaml"])
    assert result.exit_code == 2 and "GMR-100 4 problems" in result.output
    assert "GMR-101 3 is not a key of an experiment" in result.output
    for key, value in {"title": "text", "problem": "text such as", "methods": "a section with"}.items():
        assert f"GMR-107 {key} is missing\n        in empty.yaml\n        Add `{key}:`" in result.output
        assert f"and behind it {value}" in result.output


def test_what_is_wrong_in_all_methods_is_said_once_and_where_it_stands(place: Path) -> None:
    wrong = {**CONTENT["fedgmr_args"], "patience": 0, "densities": [1.0, 2.0], "probe": True}
    methods = {"a": {}, "b": {"proximal": 0.1}, "c": {"patience": -1}}
    with pytest.raises(ConfigRefused) as caught:
        load(written(place, fedgmr_args=wrong, methods=methods, against="a")).check("my.yaml")
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [
        ("GMR-104", "my.yaml: fedgmr_args.densities[1]"),
        ("GMR-104", "my.yaml: fedgmr_args.patience"),
        ("GMR-106", "my.yaml: methods.b.probe"),
        ("GMR-104", "my.yaml: methods.c.patience"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "fedprox"], "'fedprox' is not one of fedgmr, fedavg"),
        (["--seeds", "1,x"], "1,x is not a list of numbers"),
        (["--set", "patience"], "'patience' is not KEY=VALUE"),
        (["--set", "patience=3"], "GMR-101 patience names nothing in an experiment"),
        (["--set", "nothing.at.all=3"], "GMR-101 nothing.at.all names nothing"),
    ],
)
def test_wrong_options(place: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["bench", str(written(place)), *options])
    assert result.exit_code == 2 and message in result.output, result.output


EXPERIMENTS = sorted((Path(__file__).parent.parent / "benchmarks" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: str(file.stem))
def test_the_experiments_of_the_project(file: Path) -> None:
    """Every one is whole, in all forms; the paper's four have the paper's budgets."""
    experiment = load(file)
    variants = [experiment.as_varied(name) for name in experiment.variants]
    for form in (experiment, experiment.as_reduced(), *variants, *(v.as_reduced() for v in variants)):
        form.check()
        DataSpec.of(form.arguments["data"])
        assert Experiment.model_validate_json(form.model_dump_json(by_alias=True)) == form
        assert form.against in form.methods
        spent = form.config("fedgmr")
        assert spent.time_budget is not None and spent.evaluation_seconds is not None
        assert spent.time_budget / spent.evaluation_seconds >= 2 * form.last
        assert all(form.config(name).evaluate == "validation" for name in form.methods)
    paper = {"femnist": 70_000, "cifar10": 220_000, "imagenet100": 250_000, "stackoverflow": 70_000}
    if file.stem in paper:
        assert experiment.config("fedgmr").time_budget == paper[file.stem]


def test_a_reduced_form_needs_no_file_of_its_own(place: Path) -> None:
    reduced = load(written(place)).as_reduced()
    assert reduced.seeds == (1,) and reduced.fedgmr_args["time_budget"] == 60.0
    assert reduced.fedgmr_args["interval"] == CONTENT["fedgmr_args"]["interval"]
    with pytest.raises(ConfigError, match="GMR-102"):
        reduced.changed("seeds", "many")
    assert json.loads(reduced.model_dump_json(by_alias=True))["with"] == {"clients": 4}


def test_sections_of_the_reduced_form_are_merged_at_any_depth(place: Path) -> None:
    data = {"name": "digits", "split": {"by": "class", "alpha": 0.6}, "sizes": [1, 2, 3]}
    reduced = {
        "with": {"data": {"split": {"alpha": 0.1}, "sizes": [4]}},
        "methods": {"fedgmr": {"patience": 3}, "none": {"trigger": "none"}},
    }
    experiment = load(written(place, **{"with": {"data": data, "clients": 4}}, reduced=reduced))
    found = experiment.as_reduced()
    split = {"by": "class", "alpha": 0.1}
    assert found.arguments == {"data": {"name": "digits", "split": split, "sizes": [4]}, "clients": 4}
    assert found.methods == {
        "fedgmr": {"method": "fedgmr", "patience": 3},
        "fedavg": {"method": "fedavg"},
        "none": {"trigger": "none"},
    }
    assert experiment.arguments["data"] == data  # the whole form stays as it was


def test_a_variant_is_the_experiment_with_its_changes(place: Path) -> None:
    variants = {"even": {"fedgmr_args": {"densities": [0.5] * 4}}, "few": {"with": {"clients": 3}}}
    file = written(place, variants=variants)
    experiment = load(file)
    even = experiment.as_varied("even")
    assert even.title == "Digits, perceptron: even" and even.arguments == {"clients": 4}
    assert even.fedgmr_args == {**CONTENT["fedgmr_args"], "densities": [0.5] * 4}
    assert even.as_reduced().fedgmr_args["densities"] == [0.5] * 4
    command = ["bench", str(file), "--variant", "even", "--reduced", "--list"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0 and shown.output.split() == ["to", "run", "fedgmr-1", "to", "run", "fedavg-1"]
    with pytest.raises(ConfigError, match=r"GMR-103 variant=odd is unknown; there is even, few"):
        experiment.as_varied("odd")
    with pytest.raises(ConfigError, match=r"GMR-101 last cannot be changed there"):
        load(written(place, variants={"odd": {"last": 3}})).as_varied("odd")


@pytest.mark.parametrize("reduced", [{"seeds": {"a": 1}}, {"with": 3}, {"methods": {"fedgmr": 3}}])
def test_a_reduced_form_of_other_types_is_refused(place: Path, reduced: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="GMR-102"):
        load(written(place, reduced=reduced)).as_reduced()
