"""Which idle clients a window sends sub-models to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from fedgmr_plugin.engine.seeds import numpy_generator


def choose_idle(
    seed: int,
    window: int,
    clients: int,
    busy: Collection[int],
    in_flight: int,
    away: Collection[int] = (),
) -> list[int]:
    """Idle clients to dispatch to, increasing, so that at most `in_flight` train at the same time.

    All of them where there is room; else a sample without replacement, drawn from the seed tree.

    Args:
        seed: root of the seed tree.
        window: number of the window that begins.
        clients: N.
        busy: clients that train already.
        in_flight: most clients that may train.
        away: clients that cannot be reached.
    """
    taken = sorted({*busy, *away})
    free = clients - len(taken)
    slots = max(min(in_flight - len(set(busy)), free), 0)
    chosen: Iterable[int] = range(free)
    if slots < free:
        chosen = numpy_generator(seed, "sampling", window).choice(free, size=slots, replace=False).tolist()
    return sorted(_among_the_idle(position, taken) for position in chosen)


def _among_the_idle(position: int, busy: Sequence[int]) -> int:
    """The client at `position` among all that are not in `busy` (increasing)."""
    client = position
    for b in busy:
        if b > client:
            break
        client += 1
    return client
