"""Live progress on standard error: a bar on a terminal, else one line per evaluation; and what is refused."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from tqdm import tqdm


class Progress:
    """Shows a run while it goes on; silent with ``progress: false``.

    Args:
        header: the run's header record.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self._budget = header["time_budget"]
        kind = "wall" if "training_type" in header["fedml"] else "virtual"
        self._seconds = f"{kind} seconds"
        self._silent = not header["config"]["progress"]
        self._bar = tqdm(
            total=header["windows"] if self._budget is None else round(self._budget),
            unit="window" if self._budget is None else f"{kind} s",
            desc=header["run_name"],
            file=sys.stderr,
            disable=True if self._silent else None,  # None: only on a terminal
            dynamic_ncols=True,
            mininterval=0.5,
        )
        self._options, densities = header["config"], header["densities"]
        self._initial = 1.0 if self._options["dense_start"] else sum(densities) / len(densities)
        self._density = self._initial
        self._note: dict[str, str] = {}
        self._refused: set[str] = set()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def record(self, fields: dict[str, Any]) -> None:
        """Take in one record of the run log."""
        if self._silent:
            return
        if fields["type"] == "window":
            done = (
                fields["window"] + 1 if self._budget is None else min(round(fields["end"]), self._bar.total)
            )
            self._density = fields["mean_density"]
            self._note["density"] = f"{self._density:.2f}"
            self._bar.set_postfix(self._note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif fields["type"] == "evaluation" and fields["accuracy"] is not None:
            self._note["accuracy"] = f"{100 * fields['accuracy']:.1f} %"
            if self._bar.disable:
                click.echo(self._line(fields), err=True)
        elif fields["type"] == "rejected" and fields["code"] not in self._refused:
            self._refused.add(fields["code"])
            why = f"{fields['code']} {fields['message']}"
            self._bar.write(f"an upload of client {fields['client']} is refused: {why}", file=sys.stderr)

    def close_with(self, end: dict[str, Any], directory: Path) -> None:
        """Say how the run ended, where its files are, and how to look at them."""
        if not self._silent:
            say(f"run: {directory}  ({end['windows']} windows, {end['time']:,.0f} {self._seconds})")
            if end.get("rejected"):
                say(f"{end['rejected']} uploads were refused; see the log's `rejected` records")
            if self._initial < 1.0:
                say(self._restored(end["windows"]))
            say(f"model sha256: {end['model_sha256']}")
            say(f"its curves: fedgmr report {shlex.quote(str(directory))}")

    def _line(self, fields: dict[str, Any]) -> str:
        """An evaluation."""
        accuracy = 100 * fields["accuracy"]
        up, down = fields["bytes_up"] / 1e6, fields["bytes_down"] / 1e6
        return (
            f"window {fields['window']:>5}  {fields['time']:>9,.0f} s  accuracy {accuracy:5.1f} %"
            f"  density {self._density:.2f}  up {up:,.0f} MB  down {down:,.0f} MB"
        )

    def _restored(self, windows: int) -> str:
        """What became of the densities; and where nothing did that was to, when it could have."""
        now, trigger = self._density, self._options["trigger"]
        told = f"mean density: {self._initial:.2f} at the start, {now:.2f} at the end"
        if now != self._initial or trigger == "none":
            return told
        if trigger not in ("plateau", "mixed"):
            return f"{told}; trigger: {trigger} restored nobody"
        interval, patience = self._options["interval"], self._options["patience"]
        looks = (windows - 1) // interval  # there is none after the last window
        return (
            f"{told}; nobody was restored in {looks} looks for a plateau (interval: {interval} windows), "
            f"which {patience + 1} looks at least are needed for (patience: {patience})"
        )


def say(text: str) -> None:
    """Print to standard output, also where FedML has replaced ``sys.stdout.write`` by its logger."""
    stream = sys.stdout
    type(stream).write(stream, text + "\n")
    stream.flush()
