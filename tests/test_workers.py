"""Clients trained by several processes: the same bits as in one, and failures that name their cause."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.trainer import LocalStats
from fedgmr_plugin.errors import HostError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.runtimes.distributed.forks import forked


def ranking(seed: int, size: int = 40) -> Ranking:
    generator = torch.Generator().manual_seed(seed)
    return Ranking((0.2, 0.5, 1.0), torch.randint(0, 3, (size,), generator=generator, dtype=torch.int16))


def dispatch(number: int, family: Ranking, rung: int, client: int = 0) -> Dispatch:
    """Three dispatches of each version; what changes from one version to the next is a prefix."""
    version = number // 3
    ranked_D = torch.arange(float(len(family.rung_D)), dtype=torch.float64)
    ranked_D[: 1 + 11 * version % len(ranked_D)] += version + 0.5
    values_S = ranked_D[: family.ends[rung]].clone()
    return Dispatch(number, client, version, 7, family.densities[rung], family, rung, values_S, 0.25)


def halve(sent: Dispatch) -> LocalUpdate:
    """What arrived, recognisably changed."""
    assert (sent.version, sent.count, sent.learning_rate_scale) == (sent.dispatch // 3, 7, 0.25)
    if sent.client == 13:
        raise ValueError("client 13 is unlucky")
    if sent.client == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    place = float(sent.index_S.sum())
    stats = LocalStats(5, 100, 0.5 + sent.dispatch, None)
    return LocalUpdate(sent.dispatch, sent.client, sent.values_S / 2, place, stats)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_updates_come_back_in_the_order_of_the_dispatches(count: int) -> None:
    """Whoever trained them; and old rankings are known again after they were forgotten."""
    families = [ranking(seed) for seed in range(6)]
    sent = [dispatch(n, families[n % 6], n % 3, client=n % 5) for n in range(20)]
    workers = forked(halve, count)
    try:
        for window in (sent, [], sent[::-1], sent[:1]):
            assert_equal(workers.finish(window), [halve(s) for s in window])
    finally:
        workers.close()
    assert not multiprocessing.active_children()


def assert_equal(got: Sequence[LocalUpdate], wanted: Sequence[LocalUpdate]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.values_S, b.values_S)
        assert (a.dispatch, a.client, a.change_sq, a.stats) == (b.dispatch, b.client, b.change_sq, b.stats)


def test_large_payloads_both_ways_do_not_block() -> None:
    """Far more than a pipe holds."""
    family = ranking(0, size=500_000)
    sent = [dispatch(n, family, 2, client=n) for n in range(6)]
    workers = forked(halve, 2)
    try:
        assert_equal(workers.finish(sent), [halve(s) for s in sent])
    finally:
        workers.close()


@pytest.mark.parametrize(("client", "word"), [(13, "client 13 is unlucky"), (9, "exit code -9")])
def test_a_failure_stops_everything_and_says_why(client: int, word: str) -> None:
    family = ranking(0)
    sent = [replace(dispatch(n, family, 1), client=n) for n in range(8)]
    sent[5] = replace(sent[5], client=client)
    workers = forked(halve, 2)
    with pytest.raises(HostError, match=word) as caught:
        workers.finish(sent)
    assert caught.value.code == "GMR-507"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(how: signal.Signals) -> None:
    """However it dies: what a worker waits for is the pipe, and nobody else holds its other end."""
    script = (
        "import sys, time; sys.path.insert(0, 'tests')\n"
        "import test_workers as t\n"
        "workers = t.forked(t.halve, 3)\n"
        "workers.finish([t.dispatch(n, t.ranking(0), 1, client=n) for n in range(6)])\n"
        "print(*[p.channel.process.pid for p in workers.pool._peers], flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).resolve().parent.parent
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 3
    parent.send_signal(how)
    parent.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)


def alive(pid: int) -> bool:
    """Whether a process runs (one that ended and was not collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
