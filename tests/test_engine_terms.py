"""The exact decomposition of real runs: the identity closes, terms vanish with their cause."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.network import LogNormalLinks, VirtualNetwork
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.engine.terms import TERMS
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.kernels import build_layout
from fedgmr_plugin.protocol.schema import problems
from theory.check import check_logs
from theory.log import parse

DENSITIES = (1.0, 0.5, 0.2)


def network() -> nn.Sequential:
    """In float64, where rounding does not hide anything."""
    with isolated_rng(0):
        return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def samples(client: int, count: int = 24) -> TensorSamples:
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return TensorSamples(x, torch.randint(0, 3, (count,), generator=generator))


def run(
    windows: int = 8,
    *,
    eta: float = 0.2,
    steps: int = 3,
    batch: int = 6,
    densities: tuple[float, ...] = DENSITIES,
    momentum: float = 0.0,
    client_data: Any = samples,
    **options: Any,
) -> list[dict[str, Any]]:
    """The log of a run that is probed in every window on all the training data."""
    config = FedGMRConfig(
        densities=densities,
        probe=True,
        probe_interval=1,
        probe_samples=1000,
        interval=2,
        validation_fraction=0.0,
        client_momentum=momentum,
        **{"trigger": "none", "local_steps": steps, **options},
    )
    net = network()
    layout = build_layout(net)
    clients = Clients(client_data, 0.0, 0, len(densities))
    plan = Plan(0, windows, len(densities), 100, (24,) * len(densities))
    server = Server(config, plan, layout, layout.gather(net))
    clock = VirtualNetwork(config, densities, 10.0, LogNormalLinks(config, densities, 0))
    training = Training(BuiltinTrainer(momentum=momentum), BatchPlan(batch, steps, 1, True, 0), eta)
    log: list[dict[str, Any]] = []
    Simulation(
        server,
        clock,
        Workbench(config, layout, net, clients, training),
        lambda: [samples(9).take(np.arange(5))],
        log.append,
    ).run()
    header = {
        "type": "header",
        "schema": "1.0",
        "clients": len(densities),
        "densities": list(densities),
        "config": config.model_dump(mode="json"),
        "layout": {
            "size": layout.size,
            "prunable": layout.prunable,
            "dtype": "float64",
            "layers": [
                {"name": e.name, "kind": e.kind, "size": e.size, "shape": e.shape} for e in layout.entries
            ],
        },
        "eta": eta,
        "local_steps": steps,
        "windows": windows,
    }
    return [header, *log]


def of_kind(log: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in log if record["type"] == kind]


RESTORED: dict[str, Any] = {"trigger": "time", "time_fractions": (0.4,), "time_floors": (1.0,)}


@pytest.mark.parametrize("form", ["delta", "replacement"])
@pytest.mark.parametrize("staleness", ["constant", "polynomial"])
def test_the_identity_closes(form: str, staleness: str) -> None:
    log = run(update_form=form, staleness=staleness, **RESTORED)
    found = of_kind(log, "terms")
    assert len(found) == 8 and any(a["staleness"] > 0 for a in of_kind(log, "arrival"))
    for record in found:
        assert problems(record) == []
        assert record["residual_sq"] ** 0.5 <= 1e-10 * max(record["e_sq"], 1.0) ** 0.5
        c = np.array([1, 1, 1, 1, 1, 1, -1 / record["gamma"]])
        assert c @ np.array(record["gram"]) @ c == pytest.approx(record["e_sq"], rel=1e-9)
        squares = [record[f"{name}_sq"] for name in TERMS]
        assert np.diag(record["gram"]) == pytest.approx(squares, rel=1e-12)


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_the_records_follow_their_window_and_agree_with_it(form: str) -> None:
    log = run(update_form=form, **RESTORED)
    for i, record in enumerate(log):
        if record["type"] == "terms":
            assert log[i - 1]["type"] == "probe" and log[i - 1]["window"] == record["window"]
    arrivals = {a["dispatch"]: a for a in of_kind(log, "arrival")}
    dispatches = {d["dispatch"]: d for d in of_kind(log, "dispatch")}
    for record in of_kind(log, "terms"):
        for part in record["arrivals"]:
            assert part["drift_sq"] == pytest.approx(arrivals[part["dispatch"]]["drift_sq"], rel=1e-12)
            assert part["pibar"] == pytest.approx(arrivals[part["dispatch"]]["pibar"], rel=1e-12)
            sent = dispatches[part["dispatch"]]["full_masked_norm_sq"]
            assert part["mask_sq"] == pytest.approx(sent, rel=1e-12)


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_theory_finds_nothing_to_object_to(form: str) -> None:
    lines = [json.dumps(r).encode() + b"\n" for r in run(eta=0.05, update_form=form, **RESTORED)]
    report = check_logs([parse(lines)])
    laws = [f for f in report.runs[0].findings if f.group == "log"]
    assert [f.name for f in laws if f.verdict.value == "VIOLATED"] == []
    decided = {f.name for f in laws if f.verdict.value == "HOLDS"}
    assert {"terms_identity", "terms_gram", "terms_probe", "terms_gamma", "terms_arrivals"} <= decided
    bounds = {f.name: f.verdict.value for f in report.runs[0].findings if f.group == "inequality"}
    assert bounds["mask"] != "UNDETERMINED" and "VIOLATED" not in bounds.values()


# -- terms vanish with their cause -----------------------------------------------------------------------


def test_full_masks_leave_no_mask_error() -> None:
    found = of_kind(run(densities=(1.0, 1.0, 1.0)), "terms")
    assert all(r["M_sq"] == 0.0 and r["U_sq"] == 0.0 for r in found)
    assert all(p["mask_sq"] == 0.0 for r in found for p in r["arrivals"])


def test_one_step_leaves_no_drift() -> None:
    assert all(r["D_sq"] == 0.0 for r in of_kind(run(steps=1), "terms"))


def test_full_batches_leave_no_noise() -> None:
    found = of_kind(run(batch=24, steps=1), "terms")
    assert all(r["z_sq"] <= 1e-20 * r["scale_sq"] for r in found)


def test_no_delay_leaves_neither_staleness_nor_residual() -> None:
    found = of_kind(run(schedule="sync", update_form="replacement"), "terms")
    assert all(r["S_sq"] == 0.0 and r["rho_sq"] == 0.0 for r in found)


def test_equal_clients_with_equal_weights_leave_no_heterogeneity() -> None:
    same = run(densities=(1.0, 1.0, 1.0), schedule="sync", client_data=lambda _: samples(0))
    assert all(r["H_sq"] <= 1e-20 * r["scale_sq"] for r in of_kind(same, "terms"))


def test_the_delta_form_has_no_residual() -> None:
    log = run(**RESTORED)
    assert any(a["staleness"] for a in of_kind(log, "arrival"))
    assert all(r["rho_sq"] == 0.0 for r in of_kind(log, "terms"))


# -- where there is no record ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"update_scope": "buffer"},
        {"mixing": True},
        {"server_step": 0.5},
        {"aggregation": "global_average"},
    ],
)
def test_other_merges_are_not_decomposed(options: dict[str, Any]) -> None:
    log = run(3, **options)
    assert of_kind(log, "probe") and not of_kind(log, "terms")


def test_arrivals_of_another_learning_rate_are_not_decomposed() -> None:
    log = run(8, warmup_windows=100, **RESTORED)
    mixed = {a["window"] for a in of_kind(log, "arrival") if a["staleness"]}
    decomposed = {r["window"] for r in of_kind(log, "terms")}
    assert mixed and decomposed and not mixed & decomposed
    rates = {w["window"]: w["learning_rate"] for w in of_kind(log, "window")}
    for record in of_kind(log, "terms"):
        assert record["gamma"] == pytest.approx(3 * rates[record["window"]])


def test_a_hook_between_uploads_and_merge_ends_the_decomposition() -> None:
    net = network()
    layout = build_layout(net)
    config = FedGMRConfig(densities=DENSITIES, probe=True, probe_interval=1, interval=2)

    def halve(window: int, w_D: Tensor) -> Tensor:
        return w_D / 2

    server = Server(config, Plan(0, 3, 3, 100, (21,) * 3), layout, layout.gather(net), after_merge=halve)
    clock = VirtualNetwork(config, DENSITIES, 10.0, LogNormalLinks(config, DENSITIES, 0))
    training = Training(BuiltinTrainer(), BatchPlan(4, 2, 1, True, 0), 0.1)
    log: list[dict[str, Any]] = []
    clients = Clients(samples, 0.1, 0, 3)
    Simulation(
        server,
        clock,
        Workbench(config, layout, net, clients, training),
        lambda: [samples(9).take(np.arange(5))],
        log.append,
    ).run()
    assert of_kind(log, "probe") and not of_kind(log, "terms")


def test_momentum_is_part_of_z() -> None:
    """The identity closes all the same, and z is not zero although every batch is the whole data."""
    found = of_kind(run(batch=24, momentum=0.9), "terms")
    assert all(r["residual_sq"] ** 0.5 <= 1e-10 * max(r["e_sq"], 1.0) ** 0.5 for r in found)
    assert any(r["z_sq"] > 1e-6 * r["scale_sq"] for r in found)
