"""Many groups in parts that one chart can show: the forms of one method beside each other.

A chart tells seven curves apart. Beyond that, groups are drawn in panels, each with the others in grey: one
panel for the forms of each sub-model method, one for methods that have a single form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fedgmr_plugin.methods import METHODS
from fedgmr_plugin.protocol.runlog import RunLog

#: Groups that one chart tells apart.
MOST = 7
#: Groups of one panel: another group, the reference, is drawn in it too.
IN_PANEL = MOST - 1


class Panel(NamedTuple):
    """What is drawn together.

    Attributes:
        title: what the groups have in common.
        places: of the groups among all.
    """

    title: str
    places: tuple[int, ...]


def panels(runs: Sequence[RunLog]) -> list[Panel]:
    """Panels of the groups that `runs` represent, one run of each, in order of appearance.

    Groups whose methods (``heterofl``, ``heterofl+gmr``) are forms of one are together; those that are alone
    of their method are together at the place of the first. Where all groups are of one method, or nothing is
    known of methods, neighbours are.
    """
    families: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        families.setdefault(family(run), []).append(place)
    alone = [places[0] for places in families.values() if len(places) == 1]
    if len(families) == 1 or len(alone) == len(runs):
        return _cut("Configurations", range(len(runs)))
    found: list[Panel] = []
    for places in families.values():
        if len(places) > 1:
            found += _cut(_title(runs[places[0]]), places)
    if len(alone) == 1:
        found += _cut(_title(runs[alone[0]]), alone)
    elif alone:
        is_dense = all(runs[place].header["config"].get("dense_start") is True for place in alone)
        found += _cut("Methods of the whole model" if is_dense else "Other methods", alone)
    return sorted(found, key=lambda panel: panel.places)


def family(run: RunLog) -> str:
    """The method that a run's is a form of; empty where its configuration names none."""
    method = run.header["config"].get("method")
    return method.partition("+")[0] if isinstance(method, str) else ""


def _title(run: RunLog) -> str:
    name = family(run)
    return METHODS[name].title if name in METHODS else name or "Without a method"


def _cut(title: str, places: Sequence[int]) -> list[Panel]:
    """One panel, or several of about equal size where it would have too many groups."""
    count = -(-len(places) // IN_PANEL)
    if count == 1:
        return [Panel(title, tuple(places))]
    bounds = [len(places) * k // count for k in range(count + 1)]
    return [
        Panel(f"{title}, {k + 1} of {count}", tuple(places[bounds[k] : bounds[k + 1]])) for k in range(count)
    ]
