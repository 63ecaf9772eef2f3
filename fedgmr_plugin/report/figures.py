"""The figures of the page: what each shows, from which records, and its caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report import layers, raster
from fedgmr_plugin.report.families import MOST, panels
from fedgmr_plugin.report.groups import Group, Named, clock
from fedgmr_plugin.report.scales import BINS, as_percent, bin_means, nice_ticks
from fedgmr_plugin.report.statistics import FEWEST_PAIRS, align, band
from fedgmr_plugin.report.summary import evaluations
from fedgmr_plugin.report.svg import DASHES, SMALL, Axis, Series, chart, swatch
from fedgmr_plugin.report.text import escape, name, number, percent, seconds, shorten
from fedgmr_plugin.report.tracks import classes, coordinates, density_steps, held, staleness_by_window

Array = NDArray[np.float64]

#: Runs up to which both candidates of each are drawn.
BOTH_CANDIDATES = 3
#: Seeds from which an interval is drawn: from two it is 13 standard errors wide to either side.
BAND_SEEDS = FEWEST_PAIRS
#: The last half is drawn once more where it spans less of the axis than this.
_ENLARGED = 0.3
#: What the lines of a panel are that its legend does not name.
_GREY = " Grey: all other configurations; rest the pointer on one for its name."
_PLAIN = " Without markers: the one that the others are compared with."


class Figures:
    """Builds figures with ids that are unique in the page.

    A group of one run is drawn as that run; one of several as its mean, with every seed as a thin line. More
    than `families.MOST` groups are drawn in panels, each with the others in grey.

    Args:
        groups: what is drawn.
        best: places of the groups by their accuracy, the best first; those without one may be left out.
        reference: place of the group that the others are compared with.
    """

    def __init__(
        self, groups: Sequence[Group], best: Sequence[int] = (), reference: int | None = None
    ) -> None:
        self.groups, self._best, self._reference = groups, best, reference
        #: whether there are too many groups for one chart
        self.many = len(groups) > MOST
        self._panels = panels([group.runs[0].run for group in groups]) if self.many else []
        self.runs = [run for group in groups for run in group.runs]
        #: whether there is a group of several seeds
        self.seeds = any(not group.alone for group in groups)
        self._made = 0
        timed = (("window", "end"), ("evaluation", "time"), ("restoration", "time"))
        ends = np.concatenate([run.run.column(kind, key) for run in self.runs for kind, key in timed])
        ends = ends[np.isfinite(ends)]
        #: one time axis for all figures, so that they compare
        self._clock = clock([run.run for run in self.runs])
        self.seconds = Axis(f"{self._clock} time (s)", 0.0, float(ends.max()) if len(ends) else None)
        known = [run for run in self.runs if np.isfinite(run.run.column("evaluation", "accuracy")).any()]
        #: the metric that is drawn: accuracy, or loss where no run has an accuracy
        measured = any(run.run.count("evaluation") for run in self.runs)
        self.metric = "accuracy" if known or not measured else "loss"

    def metric_by_time(self) -> str:
        """Accuracy of the shipped candidate, of w and of the scaled model against virtual time."""
        title = f"{self._metric_name()} against {self._clock} time"
        series = self._metric_series(lambda run, key: evaluations(run, key)[0])
        if self.many:
            return self._overview(f"{title}, an overview", series)
        marks: list[float] = []
        caption = "Test set; thick: the model that would be shipped."
        if self._both():
            caption += " Thin: both candidates, w (dotted) and w scaled by coverage (dashed)."
        if len(self.runs) == 1:
            times = sorted(set(self.runs[0].run.column("restoration", "time").tolist()))
            marks = times if len(times) <= 40 else []
            caption += " Vertical lines: restorations." if marks else ""
        return self._drawn(title, caption + self._spread(), series, self.seconds, self._y(), marks)

    def metric_panels(self) -> str:
        """The same for each panel of groups, with all intervals; nothing where one chart shows all."""
        if not self.many:
            return ""
        series = self._metric_series(lambda run, key: evaluations(run, key)[0])
        title = f"{self._metric_name()} against {self._clock} time, panel by panel"
        caption = "Test set; the model that would be shipped."
        return self._multiples(title, caption + self._spread(), series, self.seconds, self._y())

    def metric_late(self) -> str:
        """The last half of the time on an axis of its own, where the whole axis hides how groups differ."""
        half = (self.seconds.high or 0.0) / 2
        series = self._metric_series(lambda run, key: evaluations(run, key)[0], both=False)
        late = [[_since(s, half) for s in curves] for curves in series]
        drawn = [v for curves in late for s in curves for v in (s.y, s.low, s.high) if v is not None]
        values = np.concatenate(drawn)
        values = values[np.isfinite(values)]
        whole = self._y()
        if len(self.groups) < 2 or not len(values) or whole.low is None or whole.high is None:
            return ""
        ticks = nice_ticks(float(values.min()), float(values.max()))
        if ticks[-1] - ticks[0] > _ENLARGED * (whole.high - whole.low):
            return ""
        title = f"{self._metric_name()} in the last half, enlarged"
        y, x = whole._replace(low=ticks[0], high=ticks[-1]), self.seconds._replace(low=half)
        return self._drawn(title, "The same evaluations." + self._spread(), late, x, y)

    def metric_by_bytes(self) -> str:
        """Accuracy of the shipped candidate against the clients' traffic."""

        def traffic(run: RunLog, key: str) -> Array:
            both = run.column("evaluation", "bytes_up") + run.column("evaluation", "bytes_down")
            return np.asarray(both / 1e6, dtype=np.float64)

        series = self._metric_series(traffic, both=False)
        caption = "The same evaluations; simulated bytes that the clients received and sent, summed."
        axis = Axis("traffic, up and down (MB)", low=0)
        title = f"{self._metric_name()} against bytes"
        return self._drawn(title, caption + self._spread(), series, axis, self._y())

    def densities(self, place: int) -> str:
        """Density of each client class of one group: its mean, and every client (or seed) faintly."""
        group = self.groups[place]
        steps = [(run.run, *density_steps(run.run)) for run in group.runs]
        means, single = [], []
        colours = sorted({c.density for run, _, _ in steps for c in classes(run)}, reverse=True)
        for colour, density in enumerate(colours):
            own = [
                (times, values[:, list(c.clients)])
                for run, times, values in steps
                for c in classes(run)
                if c.density == density
            ]
            dash = DASHES[colour % len(DASHES)]
            sizes = sorted({values.shape[1] for _, values in own})
            label = f"class {density:g} ({sizes[0] if len(sizes) == 1 else f'{sizes[0]}–{sizes[-1]}'})"
            curves = align([(times, values.mean(axis=1)) for times, values in own], steps=True)
            mean = curves.values.mean(axis=0)
            means.append(Series(label, curves.at, mean, colour, "steps", dash, 2.2))
            faint = own[0][1].T if group.alone else [values.mean(axis=1) for _, values in own]
            places = [own[0][0]] * len(faint) if group.alone else [times for times, _ in own]
            seen: list[Array] = [mean]
            for times, values in zip(places, faint, strict=True):
                if not any(len(values) == len(o) and np.allclose(values, o) for o in seen):
                    single.append(Series("", times, values, colour, "steps", "", 1.0, faint=True))
                    seen.append(values)
        floors = align([held(run.run, "density_floor") for run in group.runs], steps=True)
        if len(floors.at):
            floor = floors.values.mean(axis=0)
            single.append(Series("the server's floor", floors.at, floor, 6, "steps", "1 3", 1.4))
        title = "Density" if len(self.groups) == 1 else f"Density, {group.label}"
        caption = "Mean of each client class, named by its initial density (number of clients)."
        if any(s.faint for s in single):
            caption += " Thin: single clients." if group.alone else " Thin: single seeds."
        axis = Axis("density", low=0, high=1)
        return self._figure(title, caption, means + single, self.seconds, axis)

    def mean_densities(self) -> str:
        """Mean density of all clients against virtual time, group against group."""
        series = self._all(lambda run: held(run, "mean_density"), kind="steps")
        caption = "Mean over all clients" + self._thin() + "."
        return self._drawn("Mean density", caption, series, self.seconds, Axis("density", low=0, high=1))

    def participation(self) -> list[str]:
        """Uploads of every client over time, and its mean staleness: each group's first seed."""
        end = self.seconds.high or 0.0
        if not end > 0:
            return []
        first = [group.runs[0].run for group in self.groups]
        most = max((int(row.arrivals.max()) for run in first for row in raster.rows(run, end)), default=0)
        figures = []
        for group, run in zip(self.groups, first, strict=True):
            self._made += 1
            figures.append(
                raster.figure(
                    run,
                    self.seconds,
                    most,
                    ident=f"figure-{self._made}",
                    title="Who contributed when" + ("" if len(self.groups) == 1 else f", {group.label}"),
                    seed="" if group.alone else f" Seed {run.header['seed']}, of {len(group.runs)} seeds.",
                )
            )
        return figures

    def coverage(self) -> str:
        """Mean share of a window's updates that hold a coordinate."""

        def share(run: RunLog) -> tuple[Array, Array]:
            return bin_means(run.column("window", "end"), run.column("window", "coverage"))

        series = self._all(share, width=1.6)
        caption = "Mean over coordinates of the share of a window’s merged updates that hold it"
        caption += self._thin() + self._binned()
        axis = Axis("share (%)", low=0, high=1, write=as_percent)
        return self._drawn("Coverage", caption, series, self.seconds, axis)

    def covered(self) -> str:
        """Share of the coordinates that at least one update of a window holds."""

        def share(run: RunLog) -> tuple[Array, Array]:
            end, uncovered = run.columns("window", "end", "uncovered").values()
            return bin_means(end, 1 - uncovered / max(1, coordinates(run)))

        caption = "Share of the coordinates (no buffers) that at least one merged update of a window holds"
        series = self._all(share, width=1.6)
        axis = Axis("share (%)", low=0, high=1, write=as_percent)
        return self._drawn(
            "Coordinates reached", caption + self._thin() + self._binned(), series, self.seconds, axis
        )

    def by_layer(self) -> list[str]:
        """Coverage of every pruned layer: each group's first seed, as far as its log has it."""
        end, figures = self.seconds.high or 0.0, []
        for group in self.groups:
            run = group.runs[0].run
            found = layers.layers(run) if end > 0 else None
            if found is not None:
                self._made += 1
                figures.append(
                    layers.figure(
                        found,
                        self.seconds,
                        ident=f"figure-{self._made}",
                        title="Coverage by layer" + ("" if len(self.groups) == 1 else f", {group.label}"),
                        seed=""
                        if group.alone
                        else f" Seed {run.header['seed']}, of {len(group.runs)} seeds.",
                    )
                )
        return figures

    def staleness_histogram(self) -> str:
        """Share of merged uploads by staleness."""
        values = [
            [v for run in group.runs if len(v := run.run.column("arrival", "staleness"))]
            for group in self.groups
        ]
        top = max((int(v.max()) for some in values for v in some), default=0)
        width = max(1, -(-(top + 1) // 16))
        count = top // width + 1
        series: list[list[Series]] = []
        for group, some in zip(self.groups, values, strict=True):
            series.append([])
            if not some:
                continue
            counts = [np.bincount(np.clip(v, 0, None) // width, minlength=count) / len(v) for v in some]
            shares = np.mean(counts, axis=0)
            notes = [
                f"{group.label}: {percent(s)} of uploads, tau = {_range(i, width)}"
                for i, s in enumerate(shares)
            ]
            at = np.arange(count, dtype=float)
            series[-1].append(Series(group.label, at, shares, group.colour, "bars", group.dash, notes=notes))
        every = 1 if width == 1 else 2
        ticks = [(float(i), _range(i, width)) for i in range(0, count, every if count > 8 else 1)]
        x = Axis("staleness (windows)", low=-0.5, high=count - 0.5, ticks=ticks)
        caption = "How many windows had been merged between a sub-model's dispatch and its upload's merge."
        caption += " Mean of the seeds." if self.seeds else ""
        return self._drawn(
            "Staleness of the uploads", caption, series, x, Axis("uploads (%)", low=0, write=as_percent)
        )

    def staleness_by_time(self) -> str:
        """Mean staleness against virtual time."""
        series = self._all(lambda run: bin_means(*staleness_by_window(run)), width=1.6)
        caption = "Mean over the uploads of a window" + self._thin() + self._binned()
        return self._drawn(
            "Staleness over time", caption, series, self.seconds, Axis("staleness (windows)", low=0)
        )

    def traffic(self, key: str) -> str:
        """Clients' bytes in each window, one direction."""

        def sent(run: RunLog) -> tuple[Array, Array]:
            end, size = run.columns("window", "end", key).values()
            return bin_means(end, size / 1e6)

        series = self._all(sent, width=1.6)
        if key == "bytes_down" and len(self.runs) == 1:
            end, uplink = self.runs[0].run.columns("window", "end", "server_bytes_down").values()
            series[0].append(
                Series("server's uplink", *bin_means(end, uplink / 1e6), 1, dash=DASHES[1], width=1.6)
            )
        if key == "bytes_up":
            title, caption = "Upload per window", "Uploads that arrived, all clients together"
        else:
            title, caption = "Download per window", "Sub-models that left, as the clients receive them"
            if len(self.runs) == 1:
                caption += "; the server's uplink carries each increment once under IMS"
        caption += self._thin() + self._binned()
        return self._drawn(title, caption, series, self.seconds, Axis("MB per window", low=0))

    # -- parts ----------------------------------------------------------------------------------------

    def _both(self) -> bool:
        """Whether both candidates of each run are drawn."""
        return not self.seeds and len(self.runs) <= BOTH_CANDIDATES

    def _metric_series(self, x: Callable[[RunLog, str], Array], *, both: bool = True) -> list[list[Series]]:
        """The curves of each group, its mean first."""
        found = []
        for group in self.groups:
            main, seeds = self._curve(
                group,
                lambda run: (x(run, self.metric), run.column("evaluation", self.metric)),
                width=2.4,
                interval=True,
            )
            if group.alone:
                main = main._replace(notes=self._evaluation_notes(group.runs[0], main.y))
            candidates = self._candidates(group.runs[0], main.x) if both and self._both() else []
            found.append([main, *seeds, *candidates])
        return found

    def _evaluation_notes(self, run: Named, values: Array) -> list[str]:
        rows = run.run.columns("evaluation", "window", "time", "candidate")
        return [
            f"{run.label}, window {window}, {seconds(time)}: {self._shown(value)} ({candidate})"
            for window, time, candidate, value in zip(*rows.values(), values, strict=True)
        ]

    def _shown(self, value: float) -> str:
        return percent(float(value)) if self.metric == "accuracy" else number(float(value), 4)

    def _candidates(self, run: Named, place: Array) -> list[Series]:
        """Both candidates of a run: thin and in its colour, or in colours of their own if it is alone."""
        alone = len(self.runs) == 1
        pens = (("global", "w", 1, "1.5 3"), ("scaled", "w scaled by coverage", 2, "5 3"))
        return [
            Series(
                label if alone else "",
                place,
                run.run.column("evaluation", f"{which}.{self.metric}"),
                colour if alone else run.colour,
                dash=dash,
                width=1.4,
                faint=True,
            )
            for which, label, colour, dash in pens
        ]

    def _all(
        self, points: Callable[[RunLog], tuple[Array, Array]], *, kind: str = "line", width: float = 2.0
    ) -> list[list[Series]]:
        """The curves of each group: its mean, and thin ones for its seeds."""
        found = [self._curve(group, points, kind=kind, width=width) for group in self.groups]
        return [[main, *seeds] for main, seeds in found]

    def _curve(
        self,
        group: Group,
        points: Callable[[RunLog], tuple[Array, Array]],
        *,
        kind: str = "line",
        width: float = 2.0,
        interval: bool = False,
    ) -> tuple[Series, list[Series]]:
        """A group's curve, with its interval where that is wanted, and the curves of its seeds."""
        each = [points(run.run) for run in group.runs]
        main = Series(
            group.label,
            *each[0],
            group.colour,
            "steps" if kind == "steps" else "line",
            group.dash,
            width,
            at_end=1 < len(self.groups) <= MOST,
            marker=len(self.groups) > 1 and kind != "steps",
        )
        if group.alone:
            return main, []
        found = band(align(each, steps=kind == "steps"))
        main = main._replace(x=found.at, y=found.mean)
        if interval and found.n >= BAND_SEEDS:
            notes = [
                f"{group.label} at {number(at, 1)}: {self._shown(mean)} "
                f"({self._shown(low)} to {self._shown(high)}, {found.n} seeds)"
                for at, mean, low, high in zip(*found[:4], strict=True)
            ]
            main = main._replace(low=found.low, high=found.high, notes=notes)
        if self.many and (not interval or main.low is not None):
            return main, []  # a panel has no room for what its band says
        return main, [Series("", x, y, group.colour, main.kind, width=0.9, faint=True) for x, y in each]

    def _spread(self) -> str:
        """What mean, band and thin lines are."""
        if not self.seeds:
            return ""
        is_banded = any(len(group.runs) >= BAND_SEEDS for group in self.groups)
        if not (self.many and is_banded):
            text = " Mean over seeds; thin: every seed."
        elif all(len(group.runs) >= BAND_SEEDS for group in self.groups):
            text = " Mean over seeds."
        else:
            text = " Mean over seeds; thin: seeds, where they are too few for a band."
        if is_banded:
            text += (
                f" Band, from {BAND_SEEDS} seeds on: 95 % interval of the mean, Student’s t, place by place."
            )
        return text

    def _thin(self) -> str:
        if not self.seeds:
            return ""
        return ". Mean over seeds" if self.many else ". Mean over seeds; thin: every seed"

    def _metric_name(self) -> str:
        return self.metric.capitalize()

    def _y(self) -> Axis:
        """One axis for all figures of the metric: it spans what they draw of it."""
        keys = (self.metric, *(f"{which}.{self.metric}" for which in ("global", "scaled") if not self.seeds))
        values = np.concatenate([run.run.column("evaluation", key) for run in self.runs for key in keys])
        values = values[np.isfinite(values)]
        ticks = nice_ticks(float(values.min()), float(values.max())) if len(values) else [0.0, 1.0]
        if self.metric == "loss":
            return Axis("loss", ticks[0], ticks[-1])
        return Axis("accuracy (%)", max(ticks[0], 0.0), ticks[-1], as_percent)

    def _binned(self) -> str:
        long = any(run.run.count("window") > BINS for run in self.runs)
        return f". Lines show at most {BINS} means over consecutive windows." if long else "."

    def _overview(self, title: str, series: Sequence[Sequence[Series]]) -> str:
        """The best groups and the reference with their names, the others in grey."""
        known = [place for place in self._best if place != self._reference]
        shown = known[: MOST - (self._reference is not None)]
        shown += [] if self._reference is None else [self._reference]
        shown.sort(key=[*self._best, *shown].index)
        caption = f"Test set; the model that would be shipped. In colour: the best {len(shown)} by accuracy"
        if self._reference not in (None, *self._best[: len(shown)]):
            caption = caption.replace(f"best {len(shown)}", f"best {len(shown) - 1} and the reference")
        seeds = " Mean over seeds." if self.seeds else ""
        firsts = [curves[0] for curves in series]
        drawn = [firsts[place]._replace(at_end=True, low=None, high=None) for place in shown]
        drawn += [_faded(first) for place, first in enumerate(firsts) if place not in shown]
        return self._figure(title, f"{caption}.{_GREY}{seeds}", drawn, self.seconds, self._y())

    def _drawn(
        self,
        title: str,
        caption: str,
        series: Sequence[Sequence[Series]],
        x: Axis,
        y: Axis,
        marks: Sequence[float] = (),
    ) -> str:
        """The curves of all groups, in one chart, or in panels where there are many."""
        if self.many:
            return self._multiples(title, caption, series, x, y)
        firsts = [curves[0] for curves in series if curves]
        thin = [curve for curves in series for curve in curves[1:]]
        return self._figure(title, caption, firsts + thin, x, y, marks)

    def _multiples(
        self, title: str, caption: str, series: Sequence[Sequence[Series]], x: Axis, y: Axis
    ) -> str:
        """Panels of the groups on the same axes, each with the reference, and with the others in grey."""
        firsts = {place: curves[0] for place, curves in enumerate(series) if curves}
        lines = {place: first for place, first in firsts.items() if first.kind != "bars"}
        if not lines:  # bars have no background, so that each panel would have an axis of its own
            y = y._replace(high=max((float(s.y.max()) for s in firsts.values()), default=None))
        parts = []
        for panel in self._panels:
            named = [firsts[place]._replace(width=2.0) for place in panel.places if place in firsts]
            own = [curve for place in panel.places for curve in series[place][1:]]
            others = {place: s for place, s in lines.items() if place not in panel.places}
            if self._reference in others:
                named.append(_aside(others.pop(self._reference)))
            parts.append(self._panel(panel.title, title, named, [*own, *map(_faded, others.values())], x, y))
        if lines:
            caption += ("" if self._reference is None else _PLAIN) + _GREY
        return (
            f"<figure><figcaption><h3>{name(title)}</h3><p>{escape(caption)}</p></figcaption>"
            f'<div class="panels">{"".join(parts)}</div></figure>'
        )

    def _panel(
        self, name_of: str, title: str, named: Sequence[Series], rest: Sequence[Series], x: Axis, y: Axis
    ) -> str:
        self._made += 1
        head = f"<h4>{name(name_of)}</h4>{_legend(named, least=1)}"
        drawn = [s for s in (*named, *rest) if len(s.y) and np.isfinite(s.y).any()]
        if not drawn:
            return (
                f'<div class="panel">{head}<p class="empty">Nothing was recorded for this figure.</p></div>'
            )
        said = "; ".join(_said(s) for s in drawn if s.label and not s.context)
        svg = chart(
            drawn,
            x,
            y,
            ident=f"figure-{self._made}",
            title=f"{title}: {name_of}",
            description=said,
            size=SMALL,
        )
        return f'<div class="panel">{head}<div class="plot" tabindex="0">{svg}</div></div>'

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
        said = "; ".join(_said(s) for s in drawn if s.label and not s.context)
        svg = chart(drawn, x, y, ident=ident, title=title, description=f"{caption} {said}", marks=marks)
        return f'<figure>{head}{_legend(drawn)}<div class="plot" tabindex="0">{svg}</div></figure>'


def _since(s: Series, start: float) -> Series:
    """The points of a curve from `start` on."""
    at = s.x >= start
    low, high = (None if v is None else v[at] for v in (s.low, s.high))
    notes = [note for note, is_late in zip(s.notes, at, strict=True) if is_late] if s.notes else ()
    return s._replace(x=s.x[at], y=s.y[at], low=low, high=high, notes=notes)


def _faded(s: Series) -> Series:
    """A curve as part of the background."""
    return s._replace(context=True, notes=(), low=None, high=None, at_end=False)


def _aside(s: Series) -> Series:
    """A curve that those of a panel are compared with."""
    plain = s._replace(colour=6, dash="", width=1.4, marker=False)
    return plain._replace(notes=(), low=None, high=None, at_end=False)


def _legend(series: Sequence[Series], least: int = 2) -> str:
    """Samples and names of the named series; nothing for fewer than `least`."""
    shown = [s for s in series if s.label and not s.context]
    if len(shown) < least:
        return ""
    items = "".join(
        f"<li>{swatch(s.colour, s.dash, s.width, kind=s.kind, faint=s.faint, marker=s.marker)}"
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
