"""What a second process of one machine gives: runs of one and of two, alternating, on two cores or more.

    python -m benchmarks.ranks [BACKEND ...] [--windows 30] [--repeats 3] [--out FILE]
    python -m benchmarks.ranks --table

A CNN of 112,554 parameters on Fashion-MNIST, 50 clients, 10 in flight, K = 5, batch 20, high heterogeneity,
one thread a process, under mpirun, torchrun (gloo on the CPU) and as forked workers. Timed is the run itself,
not imports or data. All runs must end in the same bits. What the cores give is measured beside it: two runs
of one process at once, which share nothing. Ratios hold for cores that nobody else uses; the first row says
how many others used meanwhile.

The floor of traffic is every update's values once, and for each rank and version the longest payload that was
trained there. What is sent beyond it are rankings (a byte a parameter for each rank, whenever masks are
rebuilt); below it is what a rank still has from the version before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bench import line
from benchmarks.measure import Row, machine

Figures = dict[str, Any]

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BACKENDS = ("MPI", "NCCL", "workers")
#: Seconds after which a run is given up.
PATIENCE = 300


def configuration(backend: str, count: int, windows: int, folder: Path) -> dict[str, Any]:
    """FedML's configuration of one run."""
    return {
        "common_args": {"training_type": "simulation", "random_seed": 0, "using_mlops": False},
        "data_args": {"dataset": "fashion_mnist_parts"},
        "model_args": {"model": "small_cnn"},
        "train_args": {
            "federated_optimizer": "fedgmr",
            "client_num_in_total": 50,
            "client_num_per_round": 10,
            "comm_round": windows,
            "epochs": 1,
            "batch_size": 20,
            "client_optimizer": "sgd",
            "learning_rate": 0.05,
            "weight_decay": 0.0,
        },
        "validation_args": {"frequency_of_the_test": windows},
        "device_args": {"using_gpu": False, "gpu_mapping_key": None},
        "comm_args": {"backend": "sp" if backend == "workers" else backend},
        "tracking_args": {"enable_tracking": False, "enable_wandb": False},
        "fedgmr_args": {
            "local_steps": 5,
            "trigger": "time",
            "validation_fraction": 0.0,
            "workers": count if backend == "workers" else 1,
            "output_dir": str(folder),
            "progress": False,
            "checkpoint_seconds": None,
        },
        "benchmark_args": {"figures": str(folder / "figures.json")},
    }


def launcher(backend: str, count: int) -> list[str]:
    """How a job of `count` processes is started."""
    python = [sys.executable, "-m", "fedgmr_plugin"]
    if backend == "MPI":
        return ["mpirun", "--oversubscribe", "-np", str(count), *python]
    if backend == "NCCL":
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", *python[1:]]
    return python


def run(backend: str, count: int, windows: int) -> Figures:
    """The figures of one run; see `benchmarks.ranks_job`.

    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(configuration(backend, count, windows, folder)), encoding="utf-8")
        job = [str(ROOT / "benchmarks" / "ranks_job.py"), "--cf", str(path)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        before = time.monotonic(), *_busy()
        ended = subprocess.run(
            [*launcher(backend, count), *job],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        figures = folder / "figures.json"
        if ended.returncode or not figures.exists():
            raise RuntimeError(f"{backend} x {count}: {(ended.stdout + ended.stderr)[-3000:]}")
        elapsed, total, ours = (b - a for a, b in zip(before, (time.monotonic(), *_busy()), strict=True))
        found: Figures = json.loads(figures.read_text(encoding="utf-8"))
        return {**found, "others": max(0.0, total - ours) / elapsed}


def _busy() -> tuple[float, float]:
    """Seconds that the cores have worked: for everybody, and for this process's own that have ended."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:3])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return user + nice + system, own.ru_utime + own.ru_stime


def measure(backends: Sequence[str] = BACKENDS, windows: int = 30, repeats: int = 3) -> list[Row]:
    """The rows of this benchmark, for what can be started here.

    Raises:
        RuntimeError: a run failed, or ended in other bits.
    """
    backends = [b for b in backends if b != "MPI" or shutil.which("mpirun")]
    found: dict[tuple[str, int], list[Figures]] = {(b, n): [] for b in backends for n in (1, 2)}
    pairs: list[Figures] = []
    for _ in range(repeats):
        for (backend, count), runs in found.items():
            runs.append(run(backend, count, windows))
        with ThreadPoolExecutor(2) as both:
            pairs += both.map(lambda _: run("workers", 1, windows), range(2))
    if len({figures["sha"] for runs in [pairs, *found.values()] for figures in runs}) > 1:
        raise RuntimeError("runs of the same seed ended in different bits")
    singles = [figures for (_, count), runs in found.items() if count == 1 for figures in runs]
    others = statistics.median(figures["others"] for runs in found.values() for figures in runs)
    alone, beside = _wall(singles), _wall(pairs)
    detail = f"{beside:.2f} s each, alone {alone:.2f} s; others used {others:.2f} cores"
    rows = [Row("two runs at once", "one after the other", 2 * alone / beside, "", detail)]
    return rows + [row for b in backends for row in _rows(b, found[b, 1], found[b, 2])]


def _wall(runs: list[Figures]) -> float:
    """Median seconds of a run."""
    return statistics.median(figures["wall"] for figures in runs)


def _rows(backend: str, one: list[Figures], two: list[Figures]) -> list[Row]:
    """Rows of one backend from its runs of one process and of two."""
    gain = statistics.median(a["wall"] / b["wall"] for a, b in zip(one, two, strict=True))
    detail = f"{_wall(two):.2f} s, alone {_wall(one):.2f} s"
    rows = [Row(f"{backend}, 2 processes", "1 process", gain, "", detail)]
    for count, runs in ((1, one), (2, two)):
        if not all("busy" in figures for figures in runs):
            continue
        trained = [sum(figures["busy"].values()) for figures in runs]
        shares = [t / (count * figures["wall"]) for t, figures in zip(trained, runs, strict=True)]
        detail = f"{statistics.median(trained):.2f} s of training"
        rows.append(
            Row(
                f"{backend}, {count}: trainers busy", "all of the time", statistics.median(shares), "", detail
            )
        )
    last = two[-1]
    total, rankings = sum(last["traffic"].values()), last["rankings"]
    detail = f"{total / 1e6:.1f} MB, of which rankings {rankings / 1e6:.2f} ({rankings / total:.1%})"
    return [*rows, Row(f"{backend}, 2: bytes", "floor", total / last["floor"], "", detail)]


def table() -> str:
    """The committed figures of this benchmark and of `benchmarks.schedule` as Markdown."""
    lines = ["| what | against | measured | |", "| --- | --- | --- | --- |"]
    for name in ("ranks", "schedule"):
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for row in found["rows"]:
            lines.append(f"| {row['name']} | {row['against']} | {row['value']:.3f} | {row['detail']} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what a second process gives.")
    parser.add_argument("--table", action="store_true", help="print the committed figures as Markdown")
    parser.add_argument("backends", nargs="*", metavar="BACKEND", help=f"some of {', '.join(BACKENDS)}")
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    rows = measure(options.backends or BACKENDS, options.windows, options.repeats)
    for row in rows:
        print(line("ranks", row))
    if options.out:
        described = [{"benchmark": "ranks", **row._asdict(), "met": row.met} for row in rows]
        results = {"machine": machine(), "rows": described}
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
