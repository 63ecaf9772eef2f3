"""Logs of the plugin itself: a good one breaks no law, and what it always writes is missed or found moved."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from benchmarks.measure import Calls
from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.datasets import digits
from fedgmr_plugin.runtimes.launch import simulate
from theory.check import Report, check_logs
from theory.errors import LogError
from theory.header import CONFIG, FEDML, HEADER
from theory.laboratory import records as lab
from theory.log import parse
from theory.options import HOST, LATER, OPTIONS
from theory.schema import TERM_ARRIVAL, WRITTEN
from theory.verdict import Finding, Verdict

Records = list[dict[str, Any]]
Forgery = Callable[[Records], None]
LAWS = ("due_records", "file_order", "capacity", "refusals", "shares_logged", "nulls", "terms_scale")


class Tiny(nn.Module):
    def __init__(self, *, normalised: bool = False) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(64, 12), nn.Linear(12, 10)
        self.norm = nn.BatchNorm1d(12) if normalised else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.norm(self.hidden(x.flatten(1)))))  # type: ignore[no-any-return]


def made(folder: Path, name: str, *, normalised: bool = False, **options: Any) -> Records:
    torch.manual_seed(3)
    options = {
        "interval": 3, "patience": 1, "output_dir": str(folder), "run_name": name, "progress": False,
        "probe": True, "probe_interval": 1, "trigger": "mixed", "time_fractions": (0.3, 0.6),
        "time_floors": (0.2, 1.0), "validation_fraction": 0.2, **options,
    }  # fmt: skip
    keys = {
        "comm_round": 12, "client_num_in_total": 6, "client_num_per_round": 4, "frequency_of_the_test": 4,
        "learning_rate": 0.02,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        simulate(digits(clients=6, seed=0), Tiny(normalised=normalised), options, 3, **keys)
    return [json.loads(line) for line in (folder / name / "run.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def true(folder: Path) -> Records:
    records = made(folder, "true")
    records[0]["fedml"].setdefault("aggregation_hooks", False)
    return records


@pytest.fixture
def records(true: Records) -> Records:
    return copy.deepcopy(true)


def report(records: Records) -> Report:
    return check_logs([parse([lab.line(record) for record in records])])


def violated(records: Records) -> set[str]:
    return {finding.name for finding in report(records).violated() if finding.group == "log"}


def nth(records: Records, kind: str, number: int = -1) -> dict[str, Any]:
    return [record for record in records if record["type"] == kind][number]


def test_the_true_log_keeps_every_law(true: Records) -> None:
    found: dict[str, Finding] = {f.name: f for f in report(true).runs[0].findings if f.group == "log"}
    assert {name for name, f in found.items() if f.verdict is not Verdict.HOLDS} == set()
    assert set(LAWS) <= set(found)


def test_a_cut_log_keeps_every_law(true: Records) -> None:
    for length in range(1, len(true)):
        if true[length]["type"] != true[length - 1]["type"]:
            assert violated(true[:length]) == set(), length


def test_batch_normalisation_refutes_nothing(folder: Path) -> None:
    found = report(made(folder, "normalised", normalised=True, trigger="none"))
    assert not found.violated()
    assert {found[name].verdict for name in ("A4", "descent", "telescoped")} == {Verdict.UNDETERMINED}


def test_advice_promises_only_what_the_options_allow(folder: Path) -> None:
    quiet = made(folder, "quiet", probe=False, payload_dtype="float16")
    advised = report(quiet).runs[0].advice[0]
    assert "`probe: true`, `probe_interval: 1`, `payload_dtype: model` in fedgmr_args)" in advised
    quiet[0]["config"] |= {"payload_dtype": "model", "workers": 2}
    quiet[0] |= {"local_steps": None, "model_megabytes": 2 * quiet[0]["model_megabytes"]}
    for record in quiet:
        for key in ("bytes_up", "bytes_down", "server_bytes_down"):
            if key in record:
                record[key] *= 2
    assert violated(quiet) == set()
    advised = report(quiet).runs[0].advice[0]
    assert "`probe_interval: 1` in fedgmr_args and the built-in trainer instead of this run's own)" in advised


# -- records that are due, and their order -----------------------------------------------------------


def drop(kind: str, number: int | None = None) -> Forgery:
    """Takes out all records of a type, or one."""

    def forge(records: Records) -> None:
        gone = [record for record in records if record["type"] == kind]
        gone = gone if number is None else [gone[number]]
        records[:] = [record for record in records if all(record is not other for other in gone)]

    return forge


def repeat(kind: str, number: int = 1, **forged: Any) -> Forgery:
    def forge(records: Records) -> None:
        target = nth(records, kind, number)
        records.insert(records.index(target) + 1, {**target, **forged})

    return forge


def move(kind: str, to: int, number: int = 1) -> Forgery:
    def forge(records: Records) -> None:
        target = nth(records, kind, number)
        records.remove(target)
        records.insert(to, target)

    return forge


def last(kind: str) -> Forgery:
    """Moves all records of a type to the end."""

    def forge(records: Records) -> None:
        moved = [record for record in records if record["type"] == kind]
        records[:] = [*(r for r in records[:-1] if r["type"] != kind), *moved, records[-1]]

    return forge


def put(kind: str, number: int, **values: Any) -> Forgery:
    return lambda records: nth(records, kind, number).update(values)


def option(key: str, value: Any, group: str = "config") -> Forgery:
    return lambda records: records[0][group].__setitem__(key, value)


def refused(**values: Any) -> Forgery:
    """A refusal in window 3, of dispatch 5 of its own client, with forged keys."""

    def forge(records: Records) -> None:
        sent = nth(records, "dispatch", 5)
        record = {"type": "rejected", "window": 3, "dispatch": 5, "client": sent["client"], "message": "x"}
        window = nth(records, "window", 3)
        records.insert(records.index(window), {**record, "code": "GMR-401", **values})
        records[-1]["rejected"] = 1

    return forge


def without_a_split(records: Records) -> None:
    records[0]["config"].update(validation_fraction=0.0, trigger="time")


def silent_share(records: Records) -> None:
    """One null share, under which anything is said of the window."""
    next(r for r in records if r["type"] == "arrival" and r["window"] == 5)["pibar"] = None
    nth(records, "window", 5).update(gamma_min=7, coverage=0.01, uncovered=12345)


def silent_window(records: Records) -> None:
    for record in records:
        if record["type"] == "arrival" and record["window"] == 5:
            record["pibar"] = None


def widened(records: Records) -> None:
    """A scale that lets anything pass as rounding."""
    terms = nth(records, "terms", 5)
    terms.update(scale_sq=terms["scale_sq"] * 1e14, D_sq=terms["D_sq"] * 1000, H_sq=0.0, z_sq=12.0)


def widened_a_little(records: Records) -> None:
    terms = nth(records, "terms", 5)
    terms.update(scale_sq=terms["scale_sq"] * 1e5, residual_sq=1e-3 * terms["scale_sq"])


def swollen(records: Records) -> None:
    """A size that lets anything pass as a reduction's rounding, hidden in a buffer."""
    layout = records[0]["layout"]
    layout["layers"].append({"name": "x", "kind": "buffer", "size": 10**18, "shape": [10**18]})
    layout["size"] += 10**18
    for record in records:
        if record["type"] == "dispatch":
            record["support"] += 10**18


FORGERIES: list[tuple[Forgery, str]] = [
    *((drop(kind), "due_records") for kind in ("probe", "terms", "validation", "evaluation")),
    *((drop(kind, 1), "due_records") for kind in ("probe", "terms", "validation", "evaluation")),
    *((drop(kind, -1), "due_records") for kind in ("probe", "terms", "validation", "evaluation")),
    (repeat("probe", loss=0.01, loss_next=0.005), "due_records"),
    (repeat("validation", **{"global": {"accuracy": 1.0, "loss": 0.0}}), "due_records"),
    (repeat("evaluation"), "due_records"),
    (repeat("terms"), "due_records"),
    (option("probe", False), "due_records"),
    (option("probe_interval", 2), "due_records"),
    (without_a_split, "due_records"),
    (option("frequency_of_the_test", 5, "fedml"), "due_records"),
    *((move(kind, -1), "file_order") for kind in ("dispatch", "arrival", "window", "probe", "restoration")),
    *((move(kind, 1, -1), "file_order") for kind in ("validation", "evaluation", "terms")),
    *((last(kind), "file_order") for kind in ("dispatch", "restoration", "probe")),
    (lambda records: records.insert(2, records.pop(1)), "file_order"),
    (option("client_num_per_round", 1, "fedml"), "capacity"),
    (option("client_num_per_round", 5, "fedml"), "capacity"),
    (refused(window=999, dispatch=9999, client=-5), "refusals"),
    (refused(code="X"), "refusals"),
    (refused(code="GMR-409"), "refusals"),
    (refused(code="GMR-403", client=-5), "refusals"),
    (refused(code="GMR-402", dispatch=9999), "refusals"),
    (refused(code="GMR-406"), "refusals"),
    (refused(code="GMR-404", window=0.5), "refusals"),
    (silent_share, "shares_logged"),
    (silent_window, "shares_logged"),
    (lambda records: (records[0]["fedml"].pop("aggregation_hooks"), silent_window(records)), "shares_logged"),
    (put("terms", 5, scale_sq=0.0), "terms_scale"),
    (widened, "terms_scale"),
    (widened, "terms_gram"),
    (widened_a_little, "terms_identity"),
    (swollen, "header"),
    (put("probe", 4, loss=None), "probe_chain"),
    (put("probe", 4, grad_dot_step=None), "nulls"),
    (put("probe", 4, grad_change_sq=None), "nulls"),
    (put("terms", 4, D_sq=None), "nulls"),
    (put("terms", 4, e_sq=None), "nulls"),
    (put("terms", 4, residual_sq=None), "nulls"),
    (put("evaluation", 1, accuracy=None), "nulls"),
]  # fmt: skip


@pytest.mark.parametrize(("forge", "law"), FORGERIES, ids=range(len(FORGERIES)))
def test_every_forgery_is_found(forge: Forgery, law: str, records: Records) -> None:
    forge(records)
    assert law in violated(records)


def test_the_documentation_counts_right() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "theory.md").read_text(encoding="utf-8")
    assert f"{len(FORGERIES)} forged logs of the plugin" in page


def test_hooks_withhold_the_shares_of_a_window(records: Records) -> None:
    """A defence takes uploads out of one window's merge: its shares are null, and nothing there is judged."""
    records[0]["fedml"]["aggregation_hooks"] = True
    drop("terms")(records)
    silent_window(records)
    nth(records, "window", 5).update(gamma_min=7, coverage=0.01, uncovered=12345)
    assert violated(records) == set()


def test_refusals_as_the_plugin_writes_them_are_no_violation(records: Records) -> None:
    refused(dispatch=10**6, client=99)(records)
    assert violated(records) == set()


# -- what is always written --------------------------------------------------------------------------


def test_the_keys_are_those_of_the_page() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "run-log.md").read_text(encoding="utf-8")
    for kind, keys in WRITTEN.items():
        section = page.split(f"## `{kind}`")[1].split("\n## ")[0]
        rows = re.findall(r"^\| (`.*?) \|", section, re.M)
        named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
        assert set(" ".join(keys).split()) == set(named) - {"type"}, kind


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_key_that_is_always_written_is_there(kind: str, records: Records) -> None:
    if kind == "rejected":
        refused()(records)
    surely, otherwise = (keys.split() for keys in WRITTEN[kind])
    target = nth(records, kind)
    for key in (*surely, *otherwise):
        value = target.pop(key)
        with pytest.raises(LogError, match=f"GMR-602 {kind}: {key} is missing"):
            report(records)
        if key in surely:
            with pytest.raises(LogError, match=f"GMR-602 {kind}: {key} is null"):
                report([{**record, key: None} if record is target else record for record in records])
        target[key] = value


def test_the_arrivals_of_terms_have_every_key(records: Records) -> None:
    for key in TERM_ARRIVAL:
        changed = copy.deepcopy(records)
        del nth(changed, "terms")["arrivals"][0][key]
        with pytest.raises(LogError, match="GMR-602 terms: "):
            report(changed)


def test_a_header_has_every_key(records: Records) -> None:
    places = [("", key) for key in HEADER if key != "method"]
    places += [("config", key) for key in CONFIG] + [("fedml", key) for key in HOST]
    for outer, key in places:
        changed = copy.deepcopy(records)
        inner = changed[0][outer] if outer else changed[0]
        del inner[key]
        if outer == "config" and (OPTIONS[key].test(None) or key in LATER):
            report(changed)
            continue
        with pytest.raises(LogError, match=f"{key} is missing"):
            report(changed)


# -- the door ----------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 256, 257, -0.5, 0.0, 1e-9, 0.5, 1.0, 1.02, 7.0, "zz", "epochs", [], [0.5],
    [0.0], [1.0], [0.5, 1.0], [1.5], [-1.0], ["x"], {},
    "high", "ladder", "fixed", "proportional", "magnitude", "random", "plateau", "gradient", "none",
    "accuracy", "async", "mask_aware", "plain_average", "delta", "replacement", "arrivals", "buffer",
    "constant", "hinge", "coverage_scaled", "global", "validation", "cross_entropy", "bce", "density",
    "encoded", "model", "float16",
)  # fmt: skip


def accepted(key: str, value: Any) -> bool:
    """Whether the plugin takes `value` for the option, whatever the others are."""
    field = FedGMRConfig.model_fields[key]
    annotation: Any = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]
    value = tuple(value) if isinstance(value, list) else value
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("key", FedGMRConfig.model_fields)
def test_the_options_are_the_plugins(key: str) -> None:
    assert {repr(v): OPTIONS[key].test(v) for v in VALUES} == {repr(v): accepted(key, v) for v in VALUES}


def test_there_is_no_other_option() -> None:
    assert set(OPTIONS) == set(FedGMRConfig.model_fields)
    assert set(CONFIG) <= set(OPTIONS) and set(HOST) | {"aggregation_hooks"} >= set(FEDML)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("config.layer_floor", 1.02, "config.layer_floor=1.02 is not a number in [0, 1]"),
        ("config.server_step", 0.0, "config.server_step=0.0 is not a number above 0"),
        ("config.trigger", "zz", "config.trigger='zz' is not one of plateau, time"),
        ("config.score", None, "config.score is missing"),
        ("config.schedule", None, "config.schedule=None is not one of async, sync"),
        ("config.density_ladder", [0.5, 0.1], "config.density_ladder does not increase to 1"),
        ("config.time_floors", [0.2], "config.time_floors has 1 entries, but time_fractions 2"),
        ("config.payload_dtype", "float16", "config.probe=true, but"),
        ("fedml.client_optimizer", "zz", "fedml.client_optimizer='zz' is not one of sgd, adam"),
        ("fedml.aggregation_hooks", 1, "fedml.aggregation_hooks=1 is not true or false"),
        ("layout.dtype", "zz", "layout.dtype='zz' is not one of float64, float32, bfloat16, float16"),
        ("layout.dtype", "bfloat16", "layout.dtype='bfloat16' is not one of float32, float64"),
    ],
)
def test_what_the_plugin_cannot_have_written_is_refused(
    key: str, value: Any, words: str, records: Records
) -> None:
    outer, inner = key.split(".")
    records[0][outer][inner] = value
    with pytest.raises(LogError, match="GMR-602 header") as found:
        report(records)
    assert words in str(found.value)


def test_another_framework_names_a_type_that_is_known() -> None:
    header = {"type": "header", "schema": "1.0", "clients": 1, "layout": {"dtype": "torch.bfloat16"}}
    parse([lab.line(header)])
    header["layout"] = {"dtype": "int8"}
    with pytest.raises(LogError, match="layout.dtype='int8'"):
        parse([lab.line(header)])


def test_many_rungs_and_restorations_are_not_multiplied(records: Records) -> None:
    many = 20_000
    records[0]["config"]["density_ladder"] = [(i + 1) / many for i in range(many)]
    event = {**nth(records, "restoration"), "cause": "client_plateau", "before": 0.5, "after": 0.6}
    records[-1:-1] = [{**event, "client": i % 6} for i in range(many)]
    with Calls() as calls:
        assert "restored_densities" in violated(records)
    assert calls.count < 200 * many
