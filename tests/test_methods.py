"""The methods: each one's rule against a small program of its own, and what all of them must do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.config import FedGMRConfig, effective, parse
from fedgmr_plugin.datasets import fedml_dataset
from fedgmr_plugin.engine.client import parameter_masks
from fedgmr_plugin.engine.objectives import Context, threshold
from fedgmr_plugin.engine.restricted import known_classes
from fedgmr_plugin.engine.samples import TensorSamples
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.snapshot import Snapshot, restore_simulation, snapshot_simulation
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.engine.workbench import Clients
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.kernels import build_layout
from fedgmr_plugin.kernels.width import rank_widths, widths
from fedgmr_plugin.methods import METHODS
from fedgmr_plugin.protocol.runlog import RunLog, read_run
from fedgmr_plugin.runtimes.launch import KEYS, simulate
from fedgmr_plugin.runtimes.planning import plan_run
from fedgmr_plugin.runtimes.registration import register
from fedgmr_plugin.runtimes.run import Run, assemble
from fedgmr_plugin.runtimes.settings import fedml_keys
from fedgmr_plugin.runtimes.setup import _classes_of, prepare
from theory.cli import main as theory

SIZES = (6, 9, 7, 4)
CLIENTS = 4
RATE = 0.2
BATCH, STEPS = 4, 2
Weights = list[tuple[Tensor, Tensor]]


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(SIZES):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def blobs(seed: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Four well separated classes."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(SIZES[-1], SIZES[0])) * 2
    y = draw.integers(SIZES[-1], size=samples)
    return (centres[y] + draw.normal(size=(samples, SIZES[0])) / 2).astype(np.float32), y.astype(np.int64)


@pytest.fixture
def skewed() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Samples, labels and the clients' indices: each lacks a class."""
    x, y = blobs(1, 160)
    parts = [np.flatnonzero((y != n) & (np.arange(160) % CLIENTS == n)) for n in range(CLIENTS)]
    return x, y, parts


def iid(samples: int = 200) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    x, y = blobs(1, samples)
    return x, y, [np.arange(n, samples, CLIENTS) for n in range(CLIENTS)]


Data = tuple[np.ndarray, np.ndarray, list[np.ndarray]]


def restores(method: str) -> bool:
    return method.startswith("fedgmr") or method.endswith("+gmr")


def trained(tmp_path: Path, data: Data, windows: int, **options: Any) -> tuple[nn.Sequential, RunLog]:
    """A run's model and log."""
    model, name = perceptron(), f"run-{len(list(tmp_path.glob('*')))}"
    x, y, parts = data
    given = {
        "validation_fraction": 0.2 if restores(options["method"]) else 0.0,
        "local_steps": STEPS,
        "shuffle": False,
        "model_megabytes": 26.0,
        "progress": False,
        "output_dir": str(tmp_path),
        "run_name": name,
        "evaluate": "global",
        **options,
    }
    dataset = fedml_dataset((x, y), blobs(2, 100), parts, BATCH, classes=SIZES[-1])
    clients = len(parts)
    keys = {"client_num_in_total": clients, "client_num_per_round": clients, "comm_round": windows}
    simulate(dataset, model, given, 0, **keys, batch_size=BATCH, learning_rate=RATE)
    return model, read_run(tmp_path / name)


# -- an oracle: explicit slices, explicit loops --------------------------------------------------------------


def weights_of(model: nn.Sequential) -> Weights:
    linear = [m for m in model if isinstance(m, nn.Linear)]
    return [(m.weight.detach().clone(), m.bias.detach().clone()) for m in linear]


def distance(a: Weights, b: Weights) -> float:
    return max(
        float((x - y).abs().max()) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def forward(x: Tensor, weights: Weights) -> Tensor:
    for weight, bias in weights[:-1]:
        x = torch.relu(x @ weight.T + bias)
    return x @ weights[-1][0].T + weights[-1][1]


class Walker:
    """Batches in the data's order, round and round."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.at = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(STEPS):
            rows = [(self.at + i) % len(self.y) for i in range(BATCH)]
            self.at += BATCH
            yield self.x[rows], self.y[rows]


def local(
    weights: Weights, walker: Walker, *, mu: float = 0.0, classes: Sequence[int] | None = None
) -> Weights:
    """Plain gradient steps from `weights`, with HeteroFL's masked loss and FedProx's term."""
    start = [(w.clone(), b.clone()) for w, b in weights]
    now = [(w.clone(), b.clone()) for w, b in weights]
    for x, y in walker.batches():
        leaves = [t.requires_grad_() for pair in now for t in pair]
        scores = forward(x, now)
        if classes is not None:
            absent = [c for c in range(SIZES[-1]) if c not in classes]
            scores = scores * torch.tensor([0.0 if c in absent else 1.0 for c in range(SIZES[-1])])
        loss = F.cross_entropy(scores, y)
        loss = loss + mu / 2 * sum(((p - q) ** 2).sum() for p, q in zip(leaves, sum(start, ()), strict=True))
        grads = torch.autograd.grad(loss, leaves)
        moved = [(leaf - RATE * g).detach() for leaf, g in zip(leaves, grads, strict=True)]
        now = list(zip(moved[::2], moved[1::2], strict=True))
    return now


Units = list[list[int]]


def cut(weights: Weights, units: Units) -> Weights:
    """The sub-network of `units` of each layer, inputs and outputs included."""
    return [(w[o][:, i], b[o]) for (w, b), (i, o) in zip(weights, pairwise(units), strict=True)]


def mean_of_holders(weights: Weights, parts: list[tuple[Weights, Units, Units]]) -> Weights:
    """Every weight's mean over the sub-networks that have it, entry by entry; others stay.

    Each part: sub-network, its units, and which outputs of each layer count.
    """
    result = [(w.clone(), b.clone()) for w, b in weights]
    for layer, (weight, bias) in enumerate(result):
        for o in range(weight.shape[0]):
            holders = [p for p in parts if o in p[1][layer + 1] and o in p[2][layer + 1]]
            rows = [(p[0][layer], p[1][layer], p[1][layer + 1].index(o)) for p in holders]
            if rows:
                bias[o] = sum(own[1][at] for own, _, at in rows) / len(rows)
            for i in range(weight.shape[1]):
                found = [own[0][at, inputs.index(i)] for own, inputs, at in rows if i in inputs]
                if found:
                    weight[o, i] = sum(found) / len(found)
    return result


def units_of(width: float, first: int) -> Units:
    """FedRolex's windows, HeteroFL's slices where `first` is 0: hidden layers only."""
    hidden = [[(first + i) % c for i in range(math.ceil(width * c))] for c in SIZES[1:-1]]
    return [list(range(SIZES[0])), *hidden, list(range(SIZES[-1]))]


DENSITIES = (1.0, 0.5, 0.3, 0.1)


def by_hand(data: Data, windows: int, *, rolls: bool, labels: bool) -> Weights:
    """Rounds of HeteroFL or FedRolex."""
    x, y, parts = data
    model = perceptron()
    weights = weights_of(model)
    walkers = [Walker(x[p], y[p]) for p in parts]
    shares = [float(w) for w in widths(model, build_layout(model), DENSITIES)]
    for t in range(windows):
        uploads = []
        for n, walker in enumerate(walkers):
            units = units_of(shares[n], t if rolls else 0)
            classes = sorted(set(walker.y.tolist())) if labels else None
            counted = [*units[:-1], classes if labels else units[-1]]
            uploads.append((local(cut(weights, units), walker, classes=classes), units, counted))
        weights = mean_of_holders(weights, uploads)
    return weights


@pytest.mark.parametrize(
    ("method", "rolls", "labels"), [("heterofl", False, True), ("fedrolex", True, False)]
)
def test_width_methods_against_explicit_slices(
    tmp_path: Path, skewed: Data, method: str, rolls: bool, labels: bool
) -> None:
    model, _ = trained(tmp_path, skewed, 12, method=method, densities=list(DENSITIES))
    expected = by_hand(skewed, 12, rolls=rolls, labels=labels)
    assert distance(weights_of(model), expected) < 2e-6
    for other in ({"rolls": not rolls, "labels": labels}, {"rolls": rolls, "labels": not labels}):
        assert distance(weights_of(model), by_hand(skewed, 12, **other)) > 1e-3


@pytest.mark.parametrize("method", ["fedasync", "fedbuff"])
def test_asynchronous_methods_against_their_rules(tmp_path: Path, skewed: Data, method: str) -> None:
    """The log says who arrived when; the models are computed again from the papers' formulas."""
    alpha, mu, size = (0.6, 0.005, 1) if method == "fedasync" else (1.0, 0.0, 3)
    windows = 40
    options = {"method": method, "densities": [0.7, 1.0, 0.4, 0.1], "aggregation_seconds": 8.0}
    model, log = trained(tmp_path, skewed, windows, **options)  # several arrive while the server is busy
    x, y, parts = skewed
    walkers = [Walker(x[p], y[p]) for p in parts]
    versions = [weights_of(perceptron())]
    arrivals = log.records("arrival")
    assert max(a["staleness"] for a in arrivals) >= 1
    closed = [max(a["time"] for a in arrivals if a["window"] == t) for t in range(windows)]
    assert closed == sorted(closed)  # who came first is merged first
    for t in range(windows):
        now, here = versions[-1], [a for a in arrivals if a["window"] == t]
        assert len(here) == size
        changes = []
        for a in here:
            start = versions[a["version"]]
            end = local(start, walkers[a["client"]], mu=mu)
            damping = alpha * (1 + t - a["version"]) ** -0.5
            base = now if method == "fedasync" else start
            changes.append([[damping * (e - s) for e, s in zip(p, q, strict=True)]
                            for p, q in zip(end, base, strict=True)])  # fmt: skip
        versions.append(
            [
                tuple(v + sum(c[layer][k] for c in changes) / size for k, v in enumerate(pair))  # type: ignore[misc]
                for layer, pair in enumerate(now)
            ]
        )
    assert distance(weights_of(model), versions[-1]) < 5e-6


def test_fedprox_against_its_objective(tmp_path: Path, skewed: Data) -> None:
    model, _ = trained(tmp_path, skewed, 8, method="fedprox", proximal=0.7)
    x, y, parts = skewed
    weights, walkers = weights_of(perceptron()), [Walker(x[p], y[p]) for p in parts]
    whole = units_of(1.0, 0)
    for _ in range(8):
        weights = mean_of_holders(weights, [(local(weights, w, mu=0.7), whole, whole) for w in walkers])
    assert distance(weights_of(model), weights) < 2e-6


def batches_of(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    return [tuple(map(torch.from_numpy, blobs(seed + k, BATCH))) for k in range(count)]  # type: ignore[misc]


def test_fjord_trains_the_slice_that_each_step_draws() -> None:
    model = perceptron()
    layout, ladder = build_layout(model), (0.1, 0.3, 0.5, 1.0)
    ranking = rank_widths(model, layout, ladder)
    shares = [float(w) for w in widths(model, layout, ladder)]
    rung, batches = 2, batches_of(5, 12)
    own = units_of(shares[rung], 0)
    layout.scatter(model, layout.gather(model) * ranking.mask(rung))
    weights = weights_of(model)
    narrower = [parameter_masks(layout, ranking.mask(r)) for r in range(rung + 1)]
    torch.manual_seed(7)
    trainer = BuiltinTrainer()
    trainer.train(model, batches, narrower[rung], learning_rate=RATE, client=0, context=Context(narrower))

    torch.manual_seed(7)
    drawn = set()
    for x, y in batches:
        r = int(torch.randint(rung + 1, ()))
        drawn.add(r)
        units = units_of(shares[r], 0)
        leaves = [(w.requires_grad_(), b.requires_grad_()) for w, b in cut(weights, units)]
        grads = torch.autograd.grad(F.cross_entropy(forward(x, leaves), y), [t for p in leaves for t in p])
        for layer, (inputs, outputs) in enumerate(pairwise(units)):
            weights[layer][0][np.ix_(outputs, inputs)] -= RATE * grads[2 * layer]
            weights[layer][1][outputs] -= RATE * grads[2 * layer + 1]
    assert drawn == {0, 1, 2}
    assert distance(weights_of(model), weights) < 2e-6
    assert not layout.gather(model)[~ranking.mask(rung)].any()
    assert len(own[1]) < SIZES[1]


LADDER = (0.05, 0.1, 0.2, 0.5, 1.0)


def test_fjord_draws_from_the_ladder_up_to_the_clients_own(tmp_path: Path, skewed: Data) -> None:
    """Whole rounds: the densities of other clients, such as .3 here, are no widths of a client at .5."""
    model, _ = trained(tmp_path, skewed, 10, method="fjord", densities=list(DENSITIES))
    fresh = perceptron()
    layout, weights = build_layout(fresh), weights_of(fresh)
    known = sorted({*LADDER, *DENSITIES})
    share = {d: float(w) for d, w in zip(known, widths(fresh, layout, known), strict=True)}
    x, y, parts = skewed
    walkers = [Walker(x[p], y[p]) for p in parts]
    for count in range(10):
        uploads = []
        for client, (walker, density) in enumerate(zip(walkers, DENSITIES, strict=True)):
            choices = [units_of(share[d], 0) for d in LADDER if d < density] + [units_of(share[density], 0)]
            own = [(w.clone(), b.clone()) for w, b in weights]
            with isolated_rng(derive(0, "training", client, count)):
                for at, labels in walker.batches():
                    units = choices[int(torch.randint(len(choices), ()))]
                    leaves = [t.requires_grad_() for pair in cut(own, units) for t in pair]
                    seen = list(zip(leaves[::2], leaves[1::2], strict=True))
                    grads = torch.autograd.grad(F.cross_entropy(forward(at, seen), labels), leaves)
                    for layer, (inputs, outputs) in enumerate(pairwise(units)):
                        own[layer][0][np.ix_(outputs, inputs)] -= RATE * grads[2 * layer]
                        own[layer][1][outputs] -= RATE * grads[2 * layer + 1]
            units = choices[-1]
            uploads.append((cut(own, units), units, units))
        weights = mean_of_holders(weights, uploads)
    assert distance(weights_of(model), weights) < 2e-6


class Surrogate(torch.autograd.Function):
    """|w| >= theta, whose derivative by |w| is 2 theta / (|w| + theta)^2 on what is kept."""

    @staticmethod
    def forward(ctx: Any, size: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(size, theta)
        return (size >= theta).to(size.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size, theta = ctx.saved_tensors
        return grad * (size >= theta) * 2 * theta / (size + theta) ** 2, None


def test_fiarse_differentiates_the_threshold() -> None:
    model = perceptron()
    layout = build_layout(model)
    names = frozenset(e.name for e in layout.of_kind("prunable"))
    sizes = torch.cat([p.detach().abs().flatten() for n, p in model.named_parameters() if n in names])
    cutoff = sizes.sort().values[len(sizes) // 3]
    masks = {n: p.detach().abs() >= cutoff for n, p in model.named_parameters() if n in names}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    theta = threshold(model, masks, names)
    assert theta == float(cutoff)
    weights, batches = weights_of(model), batches_of(11, 6)
    context = Context(threshold=theta, pruned=names)
    BuiltinTrainer().train(model, batches, masks, learning_rate=RATE, client=0, context=context)

    kept = [masks.get(f"{2 * layer}.weight") for layer in range(len(SIZES) - 1)]
    dropped = 0
    for x, y in batches:
        leaves = [(w.requires_grad_(), b.requires_grad_()) for w, b in weights]
        seen = [
            (w if m is None else w * Surrogate.apply(w.abs(), torch.tensor(theta)), b)
            for (w, b), m in zip(leaves, kept, strict=True)
        ]
        pruned = [w for (w, _), m in zip(leaves, kept, strict=True) if m is not None]
        dropped += sum(int(((w != 0) & (w.abs() < theta)).sum()) for w in pruned)
        grads = torch.autograd.grad(F.cross_entropy(forward(x, seen), y), [t for p in leaves for t in p])
        weights = [
            (
                (w - RATE * grads[2 * k] * (1 if m is None else m)).detach(),
                (b - RATE * grads[2 * k + 1]).detach(),
            )
            for k, ((w, b), m) in enumerate(zip(leaves, kept, strict=True))
        ]
    assert dropped > 0
    assert distance(weights_of(model), weights) < 2e-6


def largest(weights: Weights, density: float) -> Weights:
    """Masks of the ``int(density * P)`` largest weights before the last layer, and of rows that have any."""
    sizes = torch.cat([w.abs().flatten() for w, _ in weights[:-1]])
    kept = torch.zeros(len(sizes), dtype=torch.bool)
    kept[sizes.argsort(descending=True, stable=True)[: int(density * len(sizes))]] = True
    parts = kept.split([w.numel() for w, _ in weights[:-1]])
    masks = [part.view(w.shape) for part, (w, _) in zip(parts, weights[:-1], strict=True)]
    return [(m, m.any(1)) for m in masks] + [tuple(torch.ones_like(t, dtype=torch.bool) for t in weights[-1])]  # type: ignore[misc]


def test_fiarse_by_whole_rounds(tmp_path: Path, skewed: Data) -> None:
    """Masks of each round's model, theta of each sub-model, the mean over its holders."""
    model, _ = trained(tmp_path, skewed, 10, method="fiarse", densities=list(DENSITIES))
    x, y, parts = skewed
    weights, walkers = weights_of(perceptron()), [Walker(x[p], y[p]) for p in parts]
    for _ in range(10):
        total = [[torch.zeros_like(t) for t in pair] for pair in weights]
        holders = [[torch.zeros_like(t) for t in pair] for pair in weights]
        for walker, density in zip(walkers, DENSITIES, strict=True):
            masks = largest(weights, density)
            own = [
                t * m
                for pair, kept in zip(weights, masks, strict=True)
                for t, m in zip(pair, kept, strict=True)
            ]
            flat = [m for kept in masks for m in kept]
            hidden = range(0, len(own) - 2, 2)  # places of the weights that are pruned
            theta = min(float(own[k].abs()[flat[k]].min()) for k in hidden if flat[k].any())
            for at, labels in walker.batches():
                leaves = [t.clone().requires_grad_() for t in own]
                seen = list(leaves)
                for k in hidden:
                    seen[k] = leaves[k] * Surrogate.apply(leaves[k].abs(), torch.tensor(theta))
                scores = forward(at, list(zip(seen[::2], seen[1::2], strict=True)))
                grads = torch.autograd.grad(F.cross_entropy(scores, labels), leaves)
                own = [(t - RATE * g * m).detach() for t, g, m in zip(leaves, grads, flat, strict=True)]
            for k, (t, m) in enumerate(zip(own, flat, strict=True)):
                total[k // 2][k % 2] += t * m
                holders[k // 2][k % 2] += m
        weights = [
            tuple(torch.where(n > 0, t / n.clamp_min(1), w) for w, t, n in zip(*three, strict=True))  # type: ignore[misc]
            for three in zip(weights, total, holders, strict=True)
        ]
    assert distance(weights_of(model), weights) < 5e-6


#: Densities of 63.99 and 64.0001 of the perceptron's 117 weights: one more weight, whose name would cost more
#: than the densities differ by.
NEAR = (63.99 / 117, 64.0001 / 117)
NEAR_LADDER: dict[str, Any] = {
    "density_ladder": [0.05, 0.1, 0.2, NEAR[1], 1.0],
    "time_floors": [0.1, 0.2, NEAR[1], 1.0],
}


@pytest.mark.parametrize(
    ("rule", "second", "ladder"),
    [("density", 0.5, {}), ("support", 0.5, {}), ("density", NEAR[0], NEAR_LADDER)],
)
@pytest.mark.parametrize("download", ["full", "decoupled"])
def test_decoupled_traffic_costs_what_it_sends(
    tmp_path: Path, rule: str, second: float, ladder: dict[str, Any], download: str
) -> None:
    """Bytes of every flight: its values, priced as whole ones are, and the names of what was chosen.

    Never more than all of it would cost.
    """
    initial, model = [1.0, second, 0.2, 0.1], perceptron()
    options = {"method": "fedgmr", "upload": "decoupled", "trigger": "time", "interval": 5, **ladder}
    options |= {"payload_rule": rule, "download": download}
    _, log = trained(tmp_path, iid(), 60, densities=initial, **options)
    layout, dispatches = build_layout(model), {d["dispatch"]: d for d in log.records("dispatch")}
    thinned = dearer = 0
    for arrival in log.records("arrival"):
        sent = dispatches[arrival["dispatch"]]
        held = int(sent["density"] * layout.prunable)
        chosen = min(held, int(initial[arrival["client"]] * layout.prunable))
        whole = sent["density"] if rule == "density" else sent["support"] / layout.size
        values = (sent["support"] - held + chosen) / layout.size
        if rule == "density":
            values = min(sent["density"], initial[arrival["client"]])
        names = math.log2(math.comb(held, chosen)) / 32 / layout.size
        part = min(whole, values + names)
        assert math.isclose(arrival["bytes_up"], 26e6 * part, rel_tol=1e-9)
        assert math.isclose(sent["bytes_down"], 26e6 * (whole if download == "full" else part), rel_tol=1e-9)
        thinned += chosen < held
        dearer += whole < values + names and chosen < held
    assert thinned > 3 and (dearer > 0) == bool(ladder)


def test_the_plan_prices_no_part_above_the_whole() -> None:
    keys = {**KEYS, "client_num_in_total": 4, "client_num_per_round": 4, "comm_round": 40}
    given: dict[str, Any] = {
        "method": "fedgmr", "densities": [1.0, NEAR[0], 0.2, 0.1], "client_jitter": 0, "server_jitter": 0,
        "model_megabytes": 26.0, "interval": 5, **NEAR_LADDER,
    }  # fmt: skip
    seconds = []
    for upload in ("full", "decoupled"):
        config = parse({**given, "upload": upload}, where="here")
        seconds.append(plan_run(config, fedml_keys(SimpleNamespace(**keys)), perceptron()).classes[1].seconds)
    assert seconds[0][NEAR[1]] == seconds[1][NEAR[1]] is not None
    assert seconds[0][1.0] > seconds[1][1.0]


# -- what all of them must do --------------------------------------------------------------------------------

ALL = pytest.mark.parametrize("method", list(METHODS))
#: Every method, and options that a method may be combined with.
CASES = pytest.mark.parametrize(
    ("method", "extra"),
    [
        *((m, {}) for m in METHODS),
        *((m, {"upload": "decoupled"}) for m in ("fedgmr", "fjord+gmr")),
        ("fedgmr", {"download": "decoupled", "densities": [1.0, 0.3, 0.3, 0.3]}),
        *((m, {"upload": "decoupled", "download": "decoupled"}) for m in ("fedgmr", "heterofl+gmr")),
    ],
)


def test_every_method_has_a_name_in_the_configuration() -> None:
    assert set(get_args(FedGMRConfig.model_fields["method"].annotation)) == set(METHODS)


@ALL
def test_options_of_a_method(method: str) -> None:
    config = parse({"method": method}, where="here")
    assert FedGMRConfig(method=method) == config  # type: ignore[arg-type]
    assert parse(json.loads(json.dumps(effective(config))), where="there") == config
    for key, value in METHODS[method].options.items():
        assert getattr(config, key) == value
    changed = parse({"method": method, "interval": 7, "staleness": "hinge"}, where="here")
    assert (changed.interval, changed.staleness) == (7, "hinge")


@pytest.mark.parametrize("family", ["heterofl", "fjord", "fedrolex", "fiarse"])
def test_forms_of_the_sub_model_methods(family: str) -> None:
    """What the methods page says of the three forms."""
    wanted = {"": ("sync", "arrivals", False, "none"), "+aux": ("async", "buffer", True, "none"),
              "+gmr": ("async", "buffer", True, "plateau")}  # fmt: skip
    for form, expected in wanted.items():
        c = parse({"method": family + form}, where="here")
        assert (c.schedule, c.update_scope, c.incremental_splitting, c.trigger) == expected
        assert (c.update_form, c.staleness, c.layer_floor) == ("replacement", "constant", 0.0)


@CASES
def test_a_method_learns_and_its_log_holds(
    tmp_path: Path, method: str, extra: dict[str, Any], capsys: Any
) -> None:
    """Twice the same bits; no check of the theory finds the log untrue."""
    densities = [1.0, 0.6, 0.6, 0.3]
    options = {
        "method": method,
        "densities": densities,
        "interval": 20,
        "patience": 1,
        "density_min": 0.3,
        **extra,
    }
    _, log = trained(tmp_path, iid(), 100, **options)
    assert log.records("evaluation")[-1]["accuracy"] > 0.7  # of 4 classes
    _, again = trained(tmp_path, iid(), 100, **options)
    assert log.end is not None and again.end is not None
    assert log.end["model_sha256"] == again.end["model_sha256"]
    start, last = (log.records("window")[k]["mean_density"] for k in (0, -1))
    assert (last > start) == restores(method)
    with pytest.raises(SystemExit) as status:
        theory(["check", str(log.path)])
    assert status.value.code == 0, capsys.readouterr().out


def started(tmp_path: Path, method: str, name: str, **extra: Any) -> Run:
    register()
    x, y, parts = iid()
    options = {"method": method, "densities": list(DENSITIES), "interval": 5, "patience": 1,
               "output_dir": str(tmp_path), "run_name": name, "validation_fraction": 0.2,
               "local_steps": STEPS, "progress": False, **extra}  # fmt: skip
    keys = {"client_num_in_total": CLIENTS, "client_num_per_round": CLIENTS, "comm_round": 30}
    args = SimpleNamespace(**{**KEYS, **keys, "random_seed": 3, "batch_size": BATCH, "fedgmr_args": options})
    dataset = fedml_dataset((x, y), blobs(2, 100), parts, BATCH, classes=SIZES[-1])
    return assemble(prepare(args, "cpu", dataset, perceptron()))


def finish(run: Run) -> str:
    end = None
    while end is None:
        end = run.simulation.step()
    return str(end["model_sha256"])


@CASES
def test_a_method_goes_on_from_its_snapshot(tmp_path: Path, method: str, extra: dict[str, Any]) -> None:
    first = started(tmp_path, method, "first", **extra)
    first.simulation.start()
    for _ in range(13):
        first.simulation.step()
    saved = snapshot_simulation(first.simulation)
    meta, tensors = json.loads(json.dumps(saved.meta)), load_tensors(save_tensors(saved.tensors))
    ended = finish(first)  # which leaves the snapshot as it is
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved.tensors.items())
    second = started(tmp_path, method, "second", **extra)
    restore_simulation(second.simulation, Snapshot(meta, tensors))
    assert finish(second) == ended


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("heterofl", {}),
        ("fedrolex", {}),
        ("fjord", {"density_ladder": [1.0]}),
        ("fedprox", {"proximal": 0.0}),
        ("fedbuff", {"min_updates": CLIENTS}),
        ("fiarse", {"local_objective": "plain"}),
    ],
)
def test_with_the_whole_model_it_is_fedavg(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    theirs, _ = trained(tmp_path, iid(), 10, method="fedavg", heterogeneity="none")
    ours, _ = trained(tmp_path, iid(), 10, method=method, heterogeneity="none", **options)
    assert distance(weights_of(theirs), weights_of(ours)) < 2e-6
    assert distance(weights_of(theirs), weights_of(perceptron())) > 0.05


@pytest.mark.parametrize("method", ["fjord", "heterofl", "fiarse"])
def test_worker_processes_change_no_bit(tmp_path: Path, skewed: Data, method: str) -> None:
    options = {"method": method, "densities": list(DENSITIES)}
    _, one = trained(tmp_path, skewed, 6, **options)
    _, two = trained(tmp_path, skewed, 6, **options, workers=2)
    assert one.end is not None and two.end is not None
    assert one.end["model_sha256"] == two.end["model_sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fiarse", "score": "random"}, "straight_through needs the threshold of score=magnitude"),
        ({"method": "fjord", "dense_start": True}, "ordered_dropout is about sub-models"),
        ({"method": "fedprox", "probe": True}, "probe=true measures the plain loss"),
    ],
)
def test_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(options, where="here")


def test_label_masks_need_an_output_for_each_class(tmp_path: Path) -> None:
    x, y, parts = iid()
    dataset = fedml_dataset((x, y), blobs(2, 100), parts, BATCH, classes=9)
    keys = {"client_num_in_total": CLIENTS, "client_num_per_round": CLIENTS, "comm_round": 2}
    with pytest.raises(ConfigError, match="GMR-106.*an output for each class, but 4 has 4 for class_num=9"):
        simulate(dataset, perceptron(), {"method": "heterofl", "output_dir": str(tmp_path)}, 0, **keys)


def test_classes_are_those_that_a_client_trains_on() -> None:
    clients = Clients(lambda n: TensorSamples(torch.zeros(10, 1), torch.arange(10)), 0.2, 0, 1)
    known = _classes_of(clients, SimpleNamespace(classes=10))(0)  # type: ignore[arg-type]
    assert known.nonzero().flatten().tolist() == clients.train(0).take(np.arange(8))[1].tolist()


def test_targets_below_0_are_no_classes() -> None:
    samples = TensorSamples(torch.zeros(3, 1), torch.tensor([[0, -1], [2, -100], [2, 0]]))
    assert known_classes(samples, 4).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "options", [{"method": "fedprox"}, {"batch_clients": 2}], ids=["proximal=0.01", "batch_clients=2"]
)
def test_a_users_trainer_is_not_given_what_it_cannot_do(
    tmp_path: Path, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    x, y, parts = iid()
    dataset = fedml_dataset((x, y), blobs(2, 100), parts, BATCH, classes=SIZES[-1])
    args = SimpleNamespace(
        **{**KEYS, "client_num_in_total": CLIENTS, "client_num_per_round": CLIENTS, "comm_round": 2,
           "random_seed": 0, "fedgmr_args": {"output_dir": str(tmp_path), **options}}
    )  # fmt: skip
    with pytest.raises(ConfigError, match=f"GMR-106.*{request.node.callspec.id} needs the built-in trainer"):
        prepare(args, "cpu", dataset, perceptron(), object())
