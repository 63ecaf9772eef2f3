"""The run-log records that the laboratory writes (``docs/run-log.md``, and ``terms`` and ``constants``)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from theory.laboratory.decompose import Arrival, Decomposition, Form
from theory.laboratory.masks import Ints, digest
from theory.laboratory.problems import Bools, Floats, Problem, client_grads, mean_loss

if TYPE_CHECKING:
    from theory.laboratory.simulate import Schedule

Record = dict[str, Any]
_BYTES = 8.0


def line(record: Record) -> bytes:
    """One line of the log."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def preamble(problem: Problem, schedule: Schedule) -> list[Record]:
    """The header and the constants record."""
    prunable = int(problem.prunable.sum())
    layers = [
        {"name": "weight", "kind": "prunable", "size": prunable, "shape": [prunable]},
        {
            "name": "rest",
            "kind": "dense",
            "size": problem.size - prunable,
            "shape": [problem.size - prunable],
        },
    ]
    config = {
        "aggregation": "mask_aware",
        "update_form": schedule.form,
        "update_scope": "arrivals",
        "mixing": False,
        "server_step": 1.0,
        "staleness": schedule.staleness,
        "staleness_exponent": schedule.exponent,
        "score": "magnitude",
        "layer_floor": 0.0,
        "prune_biases": bool(problem.rows),
        "local_steps": schedule.local_steps,
        "trigger": "time",
        "density_min": min(schedule.densities),
        "interval": schedule.interval,
        "client_momentum": 0.0,
        "gradient_clip": None,
        "warmup_windows": 0,
    }
    header = {
        "type": "header",
        "schema": "1.0",
        "method": "laboratory",
        "run_name": f"laboratory-{schedule.seed}",
        "seed": schedule.seed,
        "config": config,
        "clients": problem.clients,
        "densities": list(schedule.densities),
        "layout": {"size": problem.size, "prunable": prunable, "dtype": "float64", "layers": layers},
        "eta": schedule.eta,
        "local_steps": schedule.local_steps,
        "windows": schedule.windows,
        "time_budget": None,
    }
    noise = problem.noise_sq
    constants = {
        "type": "constants", "L": problem.smoothness, "sigma_sq": noise if math.isfinite(noise) else None,
        "F_inf": problem.infimum,
    }  # fmt: skip
    return [header, constants]


def dispatch(
    problem: Problem,
    number: int,
    client: int,
    version: int,
    density: float,
    order: Ints,
    keep: Bools,
    w: Floats,
) -> Record:
    """A sub-model leaves the server."""
    prunable, gone = problem.prunable, ~keep
    return {
        "type": "dispatch", "dispatch": number, "client": client, "version": version, "density": density,
        "ranking": digest(order), "support": int(keep.sum()), "time": float(version),
        "bytes_down": _BYTES * int(keep.sum()),
        "norm_sq": _sq(w[prunable]), "masked_norm_sq": _sq(w[prunable & gone]),
        "full_norm_sq": _sq(w), "full_masked_norm_sq": _sq(w[gone]),
    }  # fmt: skip


def arrival(
    t: int, number: int, version: int, density: float, samples: float, upload: Arrival, pibar: float
) -> Record:
    """An upload is applied, with the largest of its shares."""
    tau = t - version
    return {
        "type": "arrival", "window": t, "dispatch": number, "client": upload.client, "version": version,
        "staleness": tau, "density": density, "time": t + 0.5, "bytes_up": _BYTES * int(upload.mask_D.sum()),
        "samples": samples, "weight": upload.weight, "pibar": pibar, "drift_sq": upload.drift_sq,
        "change_sq": upload.change_sq, "steps": len(upload.path_KD), "train_loss": None,
    }  # fmt: skip


def window(
    t: int, w: Floats, after: Floats, uploads: Sequence[Arrival], density: Sequence[float], flying: int,
    eta: float, bytes_down: float,
) -> Record:  # fmt: skip
    """The uploads of a window are merged."""
    holders = np.sum([a.mask_D for a in uploads], axis=0) if uploads else np.zeros(len(w), dtype=np.int64)
    covered = holders > 0
    return {
        "type": "window", "window": t, "start": float(t), "close": t + 0.75, "end": t + 1.0,
        "arrivals": len(uploads), "gamma_min": int(holders[covered].min()) if covered.any() else 0,
        "uncovered": int((~covered).sum()), "coverage": float(holders.mean() / max(len(uploads), 1)),
        "step_sq": _sq(after - w), "in_flight": flying, "mean_density": float(np.mean(density)),
        "density_floor": float(min(density)), "bytes_up": sum(_BYTES * int(a.mask_D.sum()) for a in uploads),
        "bytes_down": bytes_down, "server_bytes_down": bytes_down, "learning_rate": eta,
    }  # fmt: skip


def probe(
    problem: Problem, t: int, w: Floats, after: Floats, uploads: Sequence[Arrival], rng: np.random.Generator
) -> Record:
    """F and its gradients on both sides of a window, and a sample of the noise."""
    here, there = client_grads(problem, w), client_grads(problem, after)
    grad, grad_next, step = here.mean(axis=0), there.mean(axis=0), after - w
    covered = np.any([a.mask_D for a in uploads], axis=0) if uploads else np.zeros(len(w), dtype=bool)
    noise = [0.5 * _sq(problem.noisy(n, w, rng) - problem.noisy(n, w, rng)) for n in range(problem.clients)]
    return {
        "type": "probe",
        "window": t,
        "loss": mean_loss(problem, w),
        "loss_next": mean_loss(problem, after),
        "grad_sq": _sq(grad),
        "grad_next_sq": _sq(grad_next),
        "grad_dot_step": float(grad @ step),
        "grad_change_sq": _sq(grad_next - grad),
        "step_sq": _sq(step),
        "grad_uncovered_sq": _sq(grad[~covered]),
        "client_grad_sq": [_sq(g) for g in here],
        "client_gap_sq": [_sq(g - grad) for g in here],
        "noise_sq": float(np.mean(noise)),
    }


def terms(
    t: int, exact: Decomposition, uploads: Sequence[Arrival], names: Sequence[int], form: Form
) -> Record:
    """The exact decomposition of a window."""
    stack = np.stack(list(exact.terms.values()))
    keys = ("pibar", "mask_sq", "stale_sq", "drift_sq", "gap_sq", "D_sq", "M_sq", "S_sq")
    return {
        "type": "terms", "window": t, "form": form, "gamma": exact.gamma,
        **{f"{name}_sq": _sq(vector) for name, vector in exact.terms.items()},
        "e_sq": _sq(exact.e), "b_sq": _sq(exact.bias), "residual_sq": _sq(exact.residual),
        "scale_sq": exact.scale_sq,
        "grad_dot": [float(exact.grad @ vector) for vector in exact.terms.values()],
        "gram": (stack @ stack.T).tolist(),
        "arrivals": [
            {"dispatch": name, "client": a.client, **{key: part[key] for key in keys}}
            for name, a, part in zip(names, uploads, exact.parts, strict=True)
        ],
    }  # fmt: skip


def restoration(merged: int, client: int, before: float, after: float) -> Record:
    """A client's density rises; the floor after all rises of the check is filled in by the caller."""
    return {
        "type": "restoration", "window": merged, "time": float(merged), "client": client, "cause": "time",
        "before": before, "after": after, "floor": None,
    }  # fmt: skip


def _sq(x: Floats) -> float:
    return float(x @ x)
