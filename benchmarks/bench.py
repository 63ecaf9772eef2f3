"""Every goal of speed and size, measured: prints a table with verdicts and writes JSON.

    python -m benchmarks.bench [WORD ...] [--out FILE]
    python -m benchmarks.bench --of RUN.json ... --out FILE
    python -m benchmarks.bench --table

Words choose benchmarks by name. `--of` takes the medians of several runs (an odd number): minutes of a shared
machine differ. `--table` prints the committed figures, `results/bench.json`, as Markdown.
`python -m benchmarks.compare OLD NEW` judges a change.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, machine

RESULTS = Path(__file__).parent / "results" / "bench.json"
#: Modules with a `measure() -> list[Row]`.
BENCHMARKS = (
    *("aggregate", "masks", "wire", "engine", "client_step", "updates"),
    *("batched", "launches", "schedule"),
)


def run(words: list[str]) -> dict[str, Any]:
    """Measure the chosen benchmarks, one after another."""
    rows: list[dict[str, Any]] = []
    for name in BENCHMARKS:
        if words and not any(word in name for word in words):
            continue
        start = time.perf_counter()
        measured: list[Row] = importlib.import_module(f"benchmarks.{name}").measure()
        for row in measured:
            print(line(name, row), flush=True)
            rows.append({"benchmark": name, **row._asdict(), "met": row.met})
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {"machine": machine(), "rows": rows}


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure the run that has the median, with the least and the most of all.

    Raises:
        ValueError: an even number of runs, or not all of them have the same figures of the same machine.
    """
    first, *others = runs
    keys = [[(row["benchmark"], row["name"], row["against"]) for row in run["rows"]] for run in runs]
    if len(runs) % 2 == 0 or any(run["machine"] != first["machine"] for run in others):
        raise ValueError("medians are of an odd number of runs, of one machine")
    if any(key != keys[0] for key in keys):
        raise ValueError("the runs have different figures")
    rows = []
    for of_row in zip(*(run["rows"] for run in runs), strict=True):
        in_order = sorted(of_row, key=lambda row: float(row["value"]))
        spread = {"least": in_order[0]["value"], "most": in_order[-1]["value"]}
        rows.append({**in_order[len(runs) // 2], **spread})
    return {"machine": first["machine"], "runs": len(runs), "rows": rows}


def table() -> str:
    """The committed figures as Markdown."""
    lines = ["| what | against | goal | measured | | |", "| --- | --- | --- | --- | --- | --- |"]
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]:
        verdict = {True: "met", False: "**not met**", None: ""}[row["met"]]
        goal = row["goal"].replace("<=", "≤").replace(">=", "≥")
        least, most = (f"{row[key]:.3g}" for key in ("least", "most"))
        value = f"{row['value']:.3g}" if least == most else f"{row['value']:.3g} ({least} to {most})"
        cells = (row["name"], row["against"], goal, value, verdict, row["detail"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def line(name: str, row: Row) -> str:
    """One row as text."""
    verdict = {True: "met", False: "NOT MET", None: ""}[row.met]
    return f"{row.name:48} {row.against:24} {row.value:9.3f} {row.goal:>8} {verdict:8} {row.detail}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure every goal of speed and size.")
    parser.add_argument("words", nargs="*", help="benchmarks whose name contains one of these")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--of", nargs="+", type=Path, metavar="RUN", help="take the medians of these runs")
    parser.add_argument("--table", action="store_true", help="print the committed figures as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.of:
        results = medians([json.loads(path.read_text(encoding="utf-8")) for path in options.of])
    else:
        results = run(options.words)
    met = [row["met"] for row in results["rows"] if row["met"] is not None]
    print(f"{sum(met)} of {len(met)} goals met")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
