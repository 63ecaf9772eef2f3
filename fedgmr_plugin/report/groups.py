"""Runs that differ only in their seed, gathered into groups."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report import families
from fedgmr_plugin.report.svg import DASHES
from fedgmr_plugin.report.text import clean, written

#: Configuration keys that say where a run writes, and how it is carried out, not what it computes.
IDLE = ("run_name", "output_dir", "progress", "checkpoint_seconds", "workers")
#: FedML's runtimes whose clock is a real one.
LIVE = ("cross_device", "cross_silo")
#: FedML's keys that the seed sets.
SEEDED = ("random_seed", "run_id")
#: Header keys that are compared beside the configurations.
FACTS = ("seed", "clients", "densities", "model_megabytes", "eta", "local_steps", "windows", "time_budget")
#: Of `FACTS`, those that may follow the seed.
PER_SEED = ("seed", "densities")
#: Longest label made from configuration keys.
LONGEST = 48


def clock(runs: Sequence[RunLog]) -> str:
    """Whose seconds the runs' times are: ``virtual``, of a simulated network; ``wall``, with real devices."""
    fedml = [run.header.get("fedml") for run in runs]
    live = {isinstance(keys, Mapping) and keys.get("training_type") in LIVE for keys in fedml}
    return {frozenset({True}): "wall", frozenset({False}): "virtual"}.get(frozenset(live), "virtual or wall")


class Named(NamedTuple):
    """A run under the name that the page gives it."""

    label: str
    run: RunLog
    colour: int
    dash: str


class Group(NamedTuple):
    """Runs of one configuration with different seeds, by seed; they share a colour and a dash pattern.

    Up to `families.MOST` groups differ in both. Of more, those of one panel of `families.panels` share a
    colour where panels are those of methods.
    """

    label: str
    runs: tuple[Named, ...]
    colour: int
    dash: str

    @property
    def alone(self) -> bool:
        """Whether it is a single run."""
        return len(self.runs) == 1

    @property
    def by_seed(self) -> dict[int, Named]:
        """The runs by seed."""
        return {run.run.header["seed"]: run for run in self.runs}


def pen(place: int) -> tuple[int, str]:
    """Colour and dash pattern of the run or group at one place of the page."""
    colours = len(DASHES)
    return place % colours, DASHES[(place + place // colours) % colours]


def named(runs: Sequence[RunLog]) -> list[Named]:
    """The runs with distinct labels, colours and dash patterns."""
    labels = distinct([run.name for run in runs])
    return [Named(labels[place], run, *pen(place)) for place, run in enumerate(runs)]


def grouped(runs: Sequence[RunLog]) -> list[Group]:
    """The runs by configuration, in the order in which each first appears.

    Two runs belong together if their headers say the same but for seed, names and `IDLE` keys. A group has
    every seed once: where one comes twice, runs whose names differ in more than the seed are told apart by
    name, and of those that still have the same seed each starts a group of its own.
    """
    labelled = named(runs)
    together: dict[str, list[Named]] = {}
    for run in labelled:
        together.setdefault(fingerprint(run.run), []).append(run)
    parts = [part for members in together.values() for part in _by_seed(members)]
    parts.sort(key=lambda part: min(labelled.index(run) for run in part))
    labels = _labels(parts)
    return [
        Group(label, tuple(run._replace(colour=colour, dash=dash) for run in part), colour, dash)
        for label, part, (colour, dash) in zip(
            labels, parts, _pens([part[0].run for part in parts]), strict=True
        )
    ]


def _pens(runs: Sequence[RunLog]) -> list[tuple[int, str]]:
    """Pens of groups, one run of each: where there are many, a colour for each panel of methods' forms."""
    shown = families.panels(runs) if len(runs) > families.MOST else []
    if len(shown) < 2 or len(shown) > len(DASHES) or len({families.family(run) for run in runs}) < 2:
        return [pen(place) for place in range(len(runs))]
    found = {
        place: (colour, DASHES[number % len(DASHES)])
        for colour, panel in enumerate(shown)
        for number, place in enumerate(panel.places)
    }
    return [found[place] for place in range(len(runs))]


def fingerprint(run: RunLog) -> str:
    """What a run computes but for its seed, as text: equal for runs of one group."""
    own = {key: value for key, value in options(run).items() if key not in _VARYING}
    layout = run.header["layout"]
    own |= {"method": run.header["method"], "size": layout.get("size"), "prunable": layout.get("prunable")}
    return json.dumps({key: written(value) for key, value in own.items()}, sort_keys=True)


def options(run: RunLog) -> dict[str, Any]:
    """All that was configured: `fedgmr_args`, FedML's keys, and what the header adds to them."""
    header = run.header
    own = {key: value for key, value in header["config"].items() if key != "run_name"}
    fedml = {f"FedML: {key}": value for key, value in header["fedml"].items()}
    facts = {f"run: {key}": header[key] for key in FACTS}
    samples = header["client_samples"]
    return {**own, **fedml, **facts, "run: samples": sum(samples) if samples else None}


_VARYING = {
    *IDLE,
    *(f"FedML: {key}" for key in SEEDED),
    *(f"run: {key}" for key in (*PER_SEED, "samples")),
}


def differing(runs: Sequence[Mapping[str, Any]], *, leave_out: Sequence[str] | set[str] = ()) -> list[str]:
    """Keys of `options` whose values differ between the runs, in order of appearance."""
    keys = dict.fromkeys(key for one in runs for key in one)
    return [
        key for key in keys if key not in leave_out and len({written(one.get(key, ...)) for one in runs}) > 1
    ]


def between(groups: Sequence[Group]) -> list[str]:
    """Keys of `options` that differ between the groups: not those that follow the seed, nor `IDLE` ones."""
    return differing([options(group.runs[0].run) for group in groups], leave_out=_VARYING)


def distinct(labels: Sequence[str]) -> list[str]:
    """The labels, numbered where one comes again."""
    found: list[str] = []
    for label in labels:
        chosen, again = label, 2
        while chosen in found:
            chosen, again = f"{label} ({again})", again + 1
        found.append(chosen)
    return found


def stem(name: str, seed: int) -> str:
    """A run's name without the seed at its end, such as ``fedgmr`` of ``fedgmr-seed3``."""
    cut = re.sub(rf"[\s_.\-]*(?:seed|(?<![a-z])s)?[\s_.\-=]*(?<!\d)0*{seed}$", "", name, flags=re.IGNORECASE)
    return cut or name


def _by_seed(members: list[Named]) -> list[list[Named]]:
    """Parts of runs of one configuration in which no seed comes twice, each ordered by seed."""
    seeds = [run.run.header["seed"] for run in members]
    names: dict[str, list[Named]] = {}
    for run, seed in zip(members, seeds, strict=True):
        names.setdefault(stem(run.run.name, seed) if len(set(seeds)) < len(seeds) else "", []).append(run)
    parts: list[list[Named]] = []
    for some in names.values():
        own: list[dict[int, Named]] = []
        for run in some:
            seed = run.run.header["seed"]
            free = next((part for part in own if seed not in part), None)
            if free is None:
                free = {}
                own.append(free)
            free[seed] = run
        parts += [[part[seed] for seed in sorted(part)] for part in own]
    return parts


def _labels(parts: Sequence[Sequence[Named]]) -> list[str]:
    """Names of the groups: what their runs' names share; the keys that differ where that is not enough."""
    labels = [_common(part) for part in parts]
    for label in {one for one in labels if labels.count(one) > 1 or not one}:
        same = [place for place, one in enumerate(labels) if one == label]
        configured = [options(parts[place][0].run) for place in same]
        keys = differing(configured, leave_out=_VARYING)[:2]
        for place, one in zip(same, configured, strict=True):
            said = ", ".join(f"{key.removeprefix('FedML: ')}={clean(written(one.get(key)))}" for key in keys)
            labels[place] = said if said and len(said) <= LONGEST else label or "runs"
    return distinct(labels)


def _common(part: Sequence[Named]) -> str:
    if len(part) == 1:
        return part[0].label
    stems = sorted({stem(run.run.name, run.run.header["seed"]) for run in part})
    if len(stems) == 1:
        return stems[0]
    shared = takewhile(lambda chars: len(set(chars)) == 1, zip(*stems, strict=False))
    return "".join(chars[0] for chars in shared).rstrip("-_. =(0123456789")
