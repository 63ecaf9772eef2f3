"""A run as aligned arrays: who answers which dispatch, in which window, with which step.

Shapes: W windows, A arrivals, S dispatches (sub-models sent), P probes, N clients. Row numbers refer
to the tables of the log; -1 means that there is no such row. A `Frame` never judges; where the
log is inconsistent it takes the first row, and the consistency checks speak of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from theory.log import RunLog
from theory.precision import Precision
from theory.schema import CONSTANTS, SLACK

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Why the plain merge was not this run's, where `Frame.hooked`.
HOOKED = "fedml.aggregation_hooks=true: the host's hooks may change uploads and the merged vector"
#: Why two moments of training cannot be compared, where `Frame.statistics_move`.
STATISTICS = (
    "the model has buffers (batch normalisation), which move between the points that are compared and are in "
    "no step or gradient"
)


def rows_of(keys: Floats, wanted: Floats) -> Ints:
    """Row of the first occurrence in `keys` of each of `wanted`, or -1."""
    if len(keys) == 0:
        return np.full(len(wanted), -1, dtype=np.int64)
    unique, first = np.unique(keys, return_index=True)
    at = np.minimum(np.searchsorted(unique, wanted), len(unique) - 1)
    return np.where(unique[at] == wanted, first[at], -1).astype(np.int64)


def gather(column: Floats, rows: Ints) -> Floats:
    """``column[rows]``, nan where a row is -1."""
    if len(column) == 0:
        return np.full(len(rows), np.nan)
    return np.where(rows >= 0, column[rows], np.nan)


@dataclass(frozen=True)
class Frame:
    """One run's arrays.

    Attributes:
        log: the run.
        given: known constants, by the names of `CONSTANTS`.
        slack: see `theory.schema.SLACK`.
    """

    log: RunLog
    given: dict[str, float]
    slack: float = SLACK

    @classmethod
    def of(cls, log: RunLog, given: dict[str, float] | None = None, slack: float = SLACK) -> Frame:
        """A frame whose constants come from the log's ``constants`` record, then from `given`."""
        known: dict[str, float] = {}
        table = log["constants"]
        for name in CONSTANTS:
            values = table[name][~np.isnan(table[name])]
            if len(values):
                known[name] = float(values[-1])
        return cls(log, {**known, **(given or {})}, slack)

    @cached_property
    def precision(self) -> Precision:
        """How far logged numbers may be off."""
        return Precision.of(self.log, self.slack)

    # -- joins -------------------------------------------------------------------------------------

    @cached_property
    def window_number(self) -> Floats:
        """t of each window record, ``[W]``."""
        return self.log["window"]["window"]

    @property
    def windows(self) -> int:
        """W."""
        return len(self.window_number)

    @cached_property
    def consecutive(self) -> bool:
        """Whether the windows are 0, 1, 2, ... in order."""
        return bool(np.array_equal(self.window_number, np.arange(self.windows)))

    @cached_property
    def arrival_window(self) -> Ints:
        """Window row of each arrival, ``[A]``."""
        return rows_of(self.window_number, self.log["arrival"]["window"])

    @cached_property
    def arrival_dispatch(self) -> Ints:
        """Dispatch row of each arrival, ``[A]``."""
        return rows_of(self.log["dispatch"]["dispatch"], self.log["arrival"]["dispatch"])

    @cached_property
    def probe_window(self) -> Ints:
        """Window row of each probe, ``[P]``."""
        return rows_of(self.window_number, self.log["probe"]["window"])

    @cached_property
    def window_probe(self) -> Ints:
        """Probe row of each window, ``[W]``."""
        return rows_of(self.log["probe"]["window"], self.window_number)

    @cached_property
    def window_end(self) -> Floats:
        """Virtual time at which each window ended, its close where no end is logged, ``[W]``."""
        table = self.log["window"]
        return np.asarray(np.where(np.isnan(table["end"]), table["close"], table["end"]))

    def sent(self, key: str) -> Floats:
        """A dispatch column gathered to the arrivals that answer it, ``[A]``."""
        return gather(self.log["dispatch"][key], self.arrival_dispatch)

    def per_window(self, values: Floats) -> Floats:
        """Sum over the arrivals of each window, ``[W]``; nan where a value is missing."""
        inside = self.arrival_window >= 0
        sums = np.bincount(self.arrival_window[inside], weights=values[inside], minlength=self.windows)
        return np.asarray(sums, dtype=np.float64)

    # -- the algorithm's numbers ---------------------------------------------------------------------

    @cached_property
    def eta(self) -> Floats:
        """The one learning rate of each window's uploads, ``[W]``; nan where unknown or not one.

        An upload was trained at the rate of the window in which it was dispatched, which differs from the
        window's own during warm-up. A window without arrivals has its own.
        """
        logged, fallback = self.log["window"]["learning_rate"], self.log.number("eta")
        own = np.where(np.isnan(logged), np.nan if fallback is None else fallback, logged)
        used = gather(own, rows_of(self.window_number, self.log["arrival"]["version"]))
        return np.where(self.log["window"]["arrivals"] > 0, self._common(used), own)

    @cached_property
    def steps(self) -> Floats:
        """K of each window: the one number of local steps of its arrivals, else the header's, ``[W]``."""
        fallback = self.log.number("local_steps")
        result = np.full(self.windows, np.nan if fallback is None else fallback)
        if not self.log["arrival"].logged("steps"):
            return result
        return np.where(
            self.log["window"]["arrivals"] > 0, self._common(self.log["arrival"]["steps"]), result
        )

    def _common(self, values: Floats) -> Floats:
        """The one value that a window's arrivals share, ``[W]``; nan where there are several or none."""
        low, high = self.least(values), self.most(values)
        return np.where(low == high, low, np.nan)

    def least(self, values: Floats, rows: Bools | None = None) -> Floats:
        """Smallest value of each window's arrivals (those in `rows`), ``[W]``; inf for none, nan spreads."""
        inside = self.arrival_window >= 0 if rows is None else rows & (self.arrival_window >= 0)
        result = np.full(self.windows, np.inf)
        with np.errstate(invalid="ignore"):
            np.minimum.at(result, self.arrival_window[inside], values[inside])
        return result

    def most(self, values: Floats, rows: Bools | None = None) -> Floats:
        """Largest value of each window's arrivals (those in `rows`), ``[W]``; -inf for none, nan spreads."""
        return np.asarray(-self.least(-values, rows))

    @property
    def buffered(self) -> bool:
        """Whether windows merge the last upload of every client (update scope ``buffer``)."""
        return bool(self.log.config("update_scope") == "buffer")

    @property
    def hooked(self) -> bool:
        """Whether something besides the merge may change the uploads or the merged vector of a window.

        Hooks of the host, defences, staleness that scales changes, rows that do not count, or clients that
        did not start from what the log says they were sent.
        """
        return bool(self.hook)

    @property
    def hook(self) -> str:
        """What does, in words; '' where nothing does."""
        config = self.log.config
        if self.log.fedml("aggregation_hooks") is True:
            return HOOKED
        if bool(config("trim")) or config("norm_bound") is not None:
            return "trim or norm_bound changes uploads before they are merged"
        if config("staleness_normalised") is False:
            return "staleness_normalised=false: staleness scales each upload's change"
        if config("upload") == "decoupled":
            return "upload=decoupled: clients send parts of their changes, and earlier parts with them"
        if config("download") == "decoupled":
            return "download=decoupled: clients train from values of several versions"
        return "label_masks=true: some rows of the last layer do not count" if self.lacks_rows else ""

    @property
    def lacks_rows(self) -> bool:
        """Whether uploads lack coordinates of their masks: rows of unknown classes, or what was not sent."""
        return self.log.config("label_masks") is True or self.log.config("upload") == "decoupled"

    @property
    def statistics_move(self) -> bool:
        """Whether the model has buffers (batch normalisation): they move with it, but in no step."""
        return sum(self.log.layers("buffer")) > 0

    @cached_property
    def arrivals_only(self) -> Bools:
        """Windows that merge all of their arrivals and nothing else, ``[W]``.

        Not so with update scope ``buffer`` or hooks of the host, nor where a defence took uploads out of the
        merge: there the plugin, which knows every share, logs none of the window's.
        """
        known = np.ones(self.windows, dtype=bool)
        if self.log.is_plugins:
            shares = ~np.isnan(self.log["arrival"]["pibar"])
            known = (self.per_window(shares * 1.0) > 0) | (self.log["window"]["arrivals"] == 0)
        return known & (not self.buffered) & (not self.hooked)

    def unmerged(self, otherwise: str) -> str:
        """Why a law of what a window merges has nothing to check: hooks, the update scope, or `otherwise`."""
        if self.hooked:
            return f"does not apply: {self.hook}"
        if not self.buffered:
            return otherwise
        return (
            "does not apply to update_scope=buffer: a window merges every client's last upload, not only its "
            "arrivals"
        )

    @cached_property
    def server_step(self) -> float:
        """The server's step size; 1 where the log does not say."""
        value = self.log.config("server_step")
        return 1.0 if value is None else float(value)

    @cached_property
    def gamma(self) -> Floats:
        """gamma_t = server step * eta * K, ``[W]``; nan where unknown."""
        return np.asarray(self.server_step * self.eta * self.steps)

    @cached_property
    def form(self) -> str | None:
        """``delta`` or ``replacement``, None where the log does not say."""
        form = self.log.config("update_form")
        terms = self.log["terms"]
        if form is None and len(terms) and terms.codes["form"][0] >= 0:
            form = terms.texts["form"][terms.codes["form"][0]]
        return form if form in ("delta", "replacement") else None

    @cached_property
    def kept(self) -> Floats:
        """k_n = int(d * D_p) of each dispatch, ``[S]``; nan where D_p is unknown."""
        prunable = self.log.layout("prunable")
        density = self.log["dispatch"]["density"]
        if prunable is None:
            return np.full(len(density), np.nan)
        return np.asarray(np.floor(density * prunable))

    @cached_property
    def pruned_share(self) -> Floats:
        """q_n = 1 - k_n/D_p of each dispatch, ``[S]``; 1 - d_n where D_p is unknown."""
        prunable = self.log.layout("prunable")
        if not prunable:
            return 1.0 - self.log["dispatch"]["density"]
        return np.asarray(1.0 - self.kept / prunable)

    @cached_property
    def model_sq(self) -> Floats:
        """||w_t||^2 of each window (all coordinates), ``[W]``, the latest dispatch's; nan before."""
        table = self.log["dispatch"]
        column = table["full_norm_sq"]
        known = ~np.isnan(column)
        if not known.any():
            return np.full(self.windows, np.nan)
        order = np.argsort(table["version"][known], kind="stable")
        version, norm = table["version"][known][order], column[known][order]
        at = np.searchsorted(version, self.window_number, side="right") - 1
        return np.where(at >= 0, norm[np.maximum(at, 0)], np.nan)

    # -- paths ---------------------------------------------------------------------------------------

    def path_sq(self, start: Floats, stop: Floats) -> Floats:
        """``sum ||w_{r+1} - w_r||^2`` for r = start..stop-1, one sum a row; nan where unknown.

        Each sum is taken over its own windows, so that nothing cancels.
        """
        steps = self.log["window"]["step_sq"]
        result = np.full(len(start), np.nan)
        fits = (start >= 0) & (start <= stop) & (stop <= self.windows)
        if not self.consecutive or not fits.any():
            return result
        begin, end = start[fits].astype(np.int64), stop[fits].astype(np.int64)
        padded = np.concatenate([steps, [0.0]])
        pairs = np.column_stack([begin, end]).ravel()
        result[fits] = np.where(begin == end, 0.0, np.add.reduceat(padded, pairs)[::2])
        return result

    @cached_property
    def arrival_path_sq(self) -> Floats:
        """Squared steps between dispatch and arrival, ``[A]``."""
        arrival = self.log["arrival"]
        return self.path_sq(arrival["version"], arrival["window"])

    # -- rankings ------------------------------------------------------------------------------------

    @cached_property
    def ranking_version(self) -> Floats:
        """Window in which each dispatch's ranking was made, ``[S]``; nan where it cannot be told.

        It is logged (``ranking_version``), or follows from ``config.interval``: rankings are made in the
        windows that are multiples of it.
        """
        table = self.log["dispatch"]
        logged = table["ranking_version"]
        interval = self.log.config("interval")
        if interval is None:
            return logged
        first = np.full(len(table.texts["ranking"]) + 1, np.inf)
        np.minimum.at(first, table.codes["ranking"], table["version"])
        made = np.floor(first[table.codes["ranking"]] / interval) * interval
        made = np.where(table.codes["ranking"] >= 0, made, np.nan)
        return np.where(np.isnan(logged), made, logged)

    @cached_property
    def norm_at_ranking(self) -> Floats:
        """||w_v||^2 on prunable coordinates when each dispatch's ranking was made, ``[S]``."""
        table = self.log["dispatch"]
        known = ~np.isnan(table["norm_sq"])
        rows = rows_of(table["version"][known], self.ranking_version)
        return gather(table["norm_sq"][known], rows)

    @cached_property
    def nested(self) -> Bools:
        """Whether the arrivals of each window below density 1 share one ranking, ``[W]``."""
        code = gather(self.log["dispatch"].codes["ranking"].astype(np.float64), self.arrival_dispatch)
        density = self.sent("density")
        code = np.where(code < 0, np.nan, code)
        sparse = density < 1
        low, high = self.least(code, sparse), self.most(code, sparse)
        return np.asarray(((low == high) | np.isposinf(low)) & (not self.lacks_rows))

    @cached_property
    def holders(self) -> tuple[Floats, Floats]:
        """For nested windows: weight and number of the arrivals whose mask contains n's, each ``[A]``.

        Masks of one ranking form a chain, ordered by their support (by density where it is not logged).
        """
        support = self.sent("support")
        size = np.where(np.isnan(support).any(), self.sent("density"), support)
        weight = self.log["arrival"]["weight"]
        order = np.lexsort((-size, self.arrival_window))
        heavy, many = np.full(len(size), np.nan), np.full(len(size), np.nan)
        if not len(order):
            return heavy, many
        rows, sizes, weights = self.arrival_window[order], size[order], weight[order]
        new_window = np.concatenate([[True], rows[1:] != rows[:-1]])
        new_size = new_window | np.concatenate([[True], sizes[1:] != sizes[:-1]])
        first = np.flatnonzero(new_window)
        group = np.cumsum(new_window) - 1
        last_of_tie = (
            np.concatenate([np.flatnonzero(new_size)[1:], [len(order)]])[np.cumsum(new_size) - 1] - 1
        )
        position = np.arange(len(order)) - first[group] + 1
        many[order] = position[last_of_tie]
        bounds = [*first.tolist(), len(order)]
        sums = np.concatenate([np.cumsum(weights[a:b]) for a, b in pairwise(bounds)])
        heavy[order] = sums[last_of_tie]
        return heavy, many

    @cached_property
    def rank(self) -> Floats:
        """Position of each arrival's density in its window, densest first, from 1, ``[A]``."""
        return self.rank_of(self.sent("density"))

    def rank_of(self, density: Floats) -> Floats:
        """Position of each arrival in its window by `density` ``[A]``, largest first, from 1."""
        order = np.lexsort((-density, self.arrival_window))
        rows = self.arrival_window[order]
        result = np.full(len(rows), np.nan)
        if len(rows):
            new = np.concatenate([[True], rows[1:] != rows[:-1]])
            result[order] = np.arange(len(rows)) - np.flatnonzero(new)[np.cumsum(new) - 1] + 1
        return result

    @cached_property
    def initial_density(self) -> Floats:
        """d_n^0 of each arrival's client, from the header, ``[A]``; nan where it has none."""
        return self.header_density(self.log["arrival"]["client"])

    @property
    def knows_densities(self) -> bool:
        """Whether the header says which densities clients start with; measured ones it cannot know."""
        is_measured = self.log.config("measured_densities") is True
        return self.log.header.get("densities") is not None and not is_measured

    def header_density(self, client: Floats) -> Floats:
        """The density that each of `client` starts with; nan where the header does not say.

        With ``dense_start`` every client starts whole, and nobody starts below ``density_min``; the header's
        densities are then bandwidth classes.
        """
        if self.log.config("dense_start") is True:
            return np.ones(len(client))
        if not self.knows_densities:
            return np.full(len(client), np.nan)
        start = self.log.header["densities"]
        lifted = np.maximum(np.array(start, dtype=np.float64), self.log.config("density_min") or 0.0)
        return gather(lifted, rows_of(np.arange(len(start), dtype=np.float64), client))

    @cached_property
    def frozen_share(self) -> Floats:
        """q_n of each arrival had its client kept its initial density, ``[A]``."""
        prunable = self.log.layout("prunable")
        if not prunable:
            return 1.0 - self.initial_density
        return np.asarray(1.0 - np.floor(self.initial_density * prunable) / prunable)

    def line(self, table: str, row: int) -> int:
        """Line of the log of a table's row."""
        return int(self.log[table].line[row])
