"""How fast a run is checked: 10,000 windows x 10 arrivals, in seconds, records a second and peak memory.

    python benchmarks/theory_speed.py [--windows 10000] [--clients 10] [--terms]

The log comes from the laboratory (a small quadratic problem, no delays, so that everybody arrives in every
window), with a probe in every window, and with `terms` records if asked for. Reading and checking are
timed in a fresh process, so that its peak memory is the checker's own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CHECK = """
import json, resource, sys, time
start = time.perf_counter()
from theory.check import check_logs
from theory.log import read_log
loaded = time.perf_counter()
log = read_log(sys.argv[1])
read = time.perf_counter()
report = check_logs([log])
done = time.perf_counter()
print(json.dumps({
    "import_s": loaded - start, "read_s": read - loaded, "check_s": done - read,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "violated": [finding.name for finding in report.violated()],
}))
"""


def write_log(path: Path, windows: int, clients: int, *, terms: bool) -> int:
    """Writes the run; returns its number of records."""
    from theory.laboratory import Quadratic, Schedule, records, simulate

    problem = Quadratic.random(np.random.default_rng(0), clients=clients, size=12, sigma=0.1)
    densities = tuple(float(d) for d in np.linspace(1.0, 0.25, clients))
    schedule = Schedule(windows=windows, eta=0.01, densities=densities, delays=(0,) * clients, interval=25)
    kept = [r for r in simulate(problem, schedule).records if terms or r["type"] != "terms"]
    with path.open("wb") as file:
        file.writelines(map(records.line, kept))
    return len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--terms", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        count = write_log(path, options.windows, options.clients, terms=options.terms)
        megabytes = path.stat().st_size / 1e6
        result = subprocess.run(
            [sys.executable, "-c", CHECK, str(path)], capture_output=True, text=True, check=True
        )
    found = json.loads(result.stdout)
    seconds = found["read_s"] + found["check_s"]
    machine = platform.processor() or platform.machine()
    print(f"{machine}, Python {platform.python_version()}, numpy {np.__version__}")
    print(f"{options.windows} windows x {options.clients} arrivals, terms: {options.terms}")
    print(f"{count} records, {megabytes:.0f} MB")
    print(f"import {found['import_s']:.2f} s, read {found['read_s']:.2f} s, check {found['check_s']:.2f} s")
    print(f"{count / seconds:,.0f} records/s, peak {found['peak_mb']:.0f} MB")
    print(f"violated: {found['violated'] or 'nothing'}")


if __name__ == "__main__":
    main()
