"""The figures of the page: what each shows, from which records, and its caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report.summary import evaluations
from fedgmr_plugin.report.svg import (
    BINS,
    DASHES,
    Axis,
    Series,
    as_percent,
    bin_means,
    chart,
    nice_ticks,
    swatch,
)
from fedgmr_plugin.report.text import escape, name, number, percent, seconds, shorten
from fedgmr_plugin.report.tracks import classes, density_steps, staleness_by_window

Array = NDArray[np.float64]

#: Runs up to which both candidates of each are drawn, and up to which lines are labelled at their ends.
BOTH_CANDIDATES, END_LABELS = 3, 7


class Named(NamedTuple):
    """A run under the name that the page gives it."""

    label: str
    run: RunLog
    colour: int
    dash: str


def named(runs: Sequence[RunLog]) -> list[Named]:
    """The runs with distinct labels, colours and dash patterns."""
    found: list[Named] = []
    for place, run in enumerate(runs):
        label, again = run.name, 2
        while label in {other.label for other in found}:
            label, again = f"{run.name} ({again})", again + 1
        colours = len(DASHES)
        found.append(Named(label, run, place % colours, DASHES[(place + place // colours) % colours]))
    return found


class Figures:
    """Builds figures with ids that are unique in the page."""

    def __init__(self, runs: Sequence[Named]) -> None:
        self.runs = runs
        self._made = 0
        timed = (("window", "end"), ("evaluation", "time"), ("restoration", "time"))
        ends = np.concatenate([run.run.column(kind, key) for run in runs for kind, key in timed])
        ends = ends[np.isfinite(ends)]
        #: one time axis for all figures, so that they compare
        self.seconds = Axis("virtual time (s)", 0.0, float(ends.max()) if len(ends) else None)
        known = [run for run in runs if np.isfinite(run.run.column("evaluation", "accuracy")).any()]
        #: the metric that is drawn: accuracy, or loss where no run has an accuracy
        self.metric = "accuracy" if known or not any(run.run.count("evaluation") for run in runs) else "loss"

    def metric_by_time(self) -> str:
        """Accuracy of the shipped candidate, of w and of the scaled model against virtual time."""
        series = self._metric_series(lambda run, key: evaluations(run, key)[0])
        marks: list[float] = []
        caption = "Test set; thick: the model that would be shipped."
        if len(self.runs) <= BOTH_CANDIDATES:
            caption += " Thin: both candidates, w (dotted) and w scaled by coverage (dashed)."
        if len(self.runs) == 1:
            times = sorted(set(self.runs[0].run.column("restoration", "time").tolist()))
            marks = times if len(times) <= 40 else []
            caption += " Vertical lines: restorations." if marks else ""
        return self._figure(
            f"{self._metric_name()} against virtual time", caption, series, self.seconds, self._y(), marks
        )

    def metric_by_bytes(self) -> str:
        """Accuracy of the shipped candidate against the clients' traffic."""

        def traffic(run: RunLog, key: str) -> Array:
            both = run.column("evaluation", "bytes_up") + run.column("evaluation", "bytes_down")
            return np.asarray(both / 1e6, dtype=np.float64)

        series = self._metric_series(traffic, both=False)
        caption = "The same evaluations; simulated bytes that the clients received and sent, summed."
        axis = Axis("traffic, up and down (MB)", low=0)
        return self._figure(f"{self._metric_name()} against bytes", caption, series, axis, self._y())

    def densities(self, place: int) -> str:
        """Density of each client class of one run: its mean, and every client faintly."""
        run = self.runs[place]
        times, densities = density_steps(run.run)
        means, single = [], []
        for colour, group in enumerate(classes(run.run)):
            own = densities[:, list(group.clients)]
            dash = DASHES[colour % len(DASHES)]
            label = f"class {group.density:g} ({len(group.clients)})"
            means.append(Series(label, times, own.mean(axis=1), colour, "steps", dash, 2.2))
            distinct = np.unique(own, axis=1) if len(group.clients) > 1 else own[:, :0]
            single += [
                Series("", times, column, colour, "steps", "", 1.0, faint=True)
                for column in distinct.T
                if not np.allclose(column, means[-1].y)
            ]
        single.append(Series("the server's floor", *_held(run.run, "density_floor"), 6, "steps", "1 3", 1.4))
        title = "Density" if len(self.runs) == 1 else f"Density, {run.label}"
        caption = "Mean of each client class, named by its initial density (number of clients)."
        if any(s.faint for s in single):
            caption += " Thin: single clients."
        axis = Axis("density", low=0, high=1)
        return self._figure(title, caption, means + single, self.seconds, axis)

    def mean_densities(self) -> str:
        """Mean density of all clients against virtual time, run against run."""
        series = [self._series(run, *_held(run.run, "mean_density"), kind="steps") for run in self.runs]
        caption = "Mean over all clients."
        return self._figure("Mean density", caption, series, self.seconds, Axis("density", low=0, high=1))

    def staleness_histogram(self) -> str:
        """Share of merged uploads by staleness."""
        values = [run.run.column("arrival", "staleness") for run in self.runs]
        top = max((int(v.max()) for v in values if len(v)), default=0)
        width = max(1, -(-(top + 1) // 16))
        count = top // width + 1
        series = []
        for run, staleness in zip(self.runs, values, strict=True):
            if not len(staleness):
                continue
            shares = np.bincount(np.clip(staleness, 0, None) // width, minlength=count) / len(staleness)
            notes = [
                f"{run.label}: {percent(s)} of uploads, tau = {_range(i, width)}"
                for i, s in enumerate(shares)
            ]
            series.append(
                Series(run.label, np.arange(count, dtype=float), shares, run.colour, "bars", notes=notes)
            )
        every = 1 if width == 1 else 2
        ticks = [(float(i), _range(i, width)) for i in range(0, count, every if count > 8 else 1)]
        x = Axis("staleness (windows)", low=-0.5, high=count - 0.5, ticks=ticks)
        caption = "How many windows had been merged between a sub-model's dispatch and its upload's merge."
        return self._figure(
            "Staleness of the uploads", caption, series, x, Axis("uploads (%)", low=0, write=as_percent)
        )

    def staleness_by_time(self) -> str:
        """Mean staleness against virtual time."""
        series = [
            self._series(run, *bin_means(*staleness_by_window(run.run)), width=1.6) for run in self.runs
        ]
        caption = "Mean over the uploads of a window" + self._binned()
        return self._figure(
            "Staleness over time", caption, series, self.seconds, Axis("staleness (windows)", low=0)
        )

    def traffic(self, key: str) -> str:
        """Clients' bytes in each window, one direction."""
        series = []
        for run in self.runs:
            end, sent, uplink = run.run.columns("window", "end", key, "server_bytes_down").values()
            series.append(self._series(run, *bin_means(end, sent / 1e6), width=1.6))
            if key == "bytes_down" and len(self.runs) == 1:
                x, y = bin_means(end, uplink / 1e6)
                series.append(Series("server's uplink", x, y, 1, dash=DASHES[1], width=1.6))
        if key == "bytes_up":
            title, caption = "Upload per window", "Uploads that arrived, all clients together"
        else:
            title, caption = "Download per window", "Sub-models that left, as the clients receive them"
            if len(self.runs) == 1:
                caption += "; the server's uplink carries each increment once under IMS"
        return self._figure(
            title, caption + self._binned(), series, self.seconds, Axis("MB per window", low=0)
        )

    # -- parts ----------------------------------------------------------------------------------------

    def _metric_series(self, x: Callable[[RunLog, str], Array], *, both: bool = True) -> list[Series]:
        shipped, thin = [], []
        for run in self.runs:
            place, value = x(run.run, self.metric), run.run.column("evaluation", self.metric)
            shipped.append(
                self._series(run, place, value, width=2.4, notes=self._evaluation_notes(run, value))
            )
            if both and len(self.runs) <= BOTH_CANDIDATES:
                thin += self._candidates(run, place)
        return shipped + thin

    def _evaluation_notes(self, run: Named, values: Array) -> list[str]:
        shown = percent if self.metric == "accuracy" else (lambda value: number(value, 4))
        rows = run.run.columns("evaluation", "window", "time", "candidate")
        return [
            f"{run.label}, window {window}, {seconds(time)}: {shown(float(value))} ({candidate})"
            for window, time, candidate, value in zip(*rows.values(), values, strict=True)
        ]

    def _candidates(self, run: Named, place: Array) -> list[Series]:
        """Both candidates of a run: thin and in its colour, or in colours of their own if it is alone."""
        alone = len(self.runs) == 1
        w, scaled = (run.run.column("evaluation", f"{which}.{self.metric}") for which in ("global", "scaled"))
        return [
            Series(
                "w" if alone else "",
                place,
                w,
                1 if alone else run.colour,
                dash="1.5 3",
                width=1.4,
                faint=True,
            ),
            Series(
                "w scaled by coverage" if alone else "",
                place,
                scaled,
                2 if alone else run.colour,
                dash="5 3",
                width=1.4,
                faint=True,
            ),
        ]

    def _series(
        self,
        run: Named,
        x: Array,
        y: Array,
        *,
        kind: str = "line",
        width: float = 2.0,
        notes: Sequence[str] = (),
    ) -> Series:
        at_end = 1 < len(self.runs) <= END_LABELS
        return Series(
            run.label,
            x,
            y,
            run.colour,
            "steps" if kind == "steps" else "line",
            run.dash,
            width,
            at_end=at_end,
            notes=notes,
        )

    def _metric_name(self) -> str:
        return self.metric.capitalize()

    def _y(self) -> Axis:
        """One axis for all figures of the metric: it spans the shipped model and both candidates."""
        keys = (self.metric, f"global.{self.metric}", f"scaled.{self.metric}")
        values = np.concatenate([run.run.column("evaluation", key) for run in self.runs for key in keys])
        values = values[np.isfinite(values)]
        ticks = nice_ticks(float(values.min()), float(values.max())) if len(values) else [0.0, 1.0]
        if self.metric == "loss":
            return Axis("loss", ticks[0], ticks[-1])
        return Axis("accuracy (%)", max(ticks[0], 0.0), ticks[-1], as_percent)

    def _binned(self) -> str:
        long = any(run.run.count("window") > BINS for run in self.runs)
        return f". Each line shows {BINS} means over consecutive windows." if long else "."

    def _figure(
        self,
        title: str,
        caption: str,
        series: Sequence[Series],
        x: Axis,
        y: Axis,
        marks: Sequence[float] = (),
    ) -> str:
        self._made += 1
        ident = f"figure-{self._made}"
        drawn = [s for s in series if len(s.y) and np.isfinite(s.y).any()]
        head = f"<figcaption><h3>{name(title)}</h3><p>{escape(caption)}</p></figcaption>"
        if not drawn:
            return f'<figure>{head}<p class="empty">Nothing was recorded for this figure.</p></figure>'
        said = "; ".join(_said(s) for s in drawn if s.label)
        svg = chart(drawn, x, y, ident=ident, title=title, description=f"{caption} {said}", marks=marks)
        return f'<figure>{head}{_legend(drawn)}<div class="plot" tabindex="0">{svg}</div></figure>'


def _held(run: RunLog, key: str) -> tuple[Array, Array]:
    """A number of the window records as steps: it holds from a window's start to its end."""
    start, end, value = run.columns("window", "start", "end", key).values()
    return np.append(start, end[-1:]), np.append(value, value[-1:])


def _legend(series: Sequence[Series]) -> str:
    """Samples and names of the named series; nothing for a single one."""
    shown = [s for s in series if s.label]
    if len(shown) < 2:
        return ""
    items = "".join(
        f"<li>{swatch(s.colour, s.dash, s.width, kind=s.kind, faint=s.faint)}"
        f"{name(shorten(s.label, 40))}</li>"
        for s in shown
    )
    return f'<ul class="legend">{items}</ul>'


def _said(s: Series) -> str:
    """First and last value of a series, for those who hear the figure."""
    known = s.y[np.isfinite(s.y)]
    if s.kind == "bars":
        return f"{s.label}: largest at {s.x[int(np.nanargmax(s.y))]:g}"
    return f"{s.label}: from {known[0]:.4g} to {known[-1]:.4g}"


def _range(place: int, width: int) -> str:
    low = place * width
    return str(low) if width == 1 else f"{low}–{low + width - 1}"
