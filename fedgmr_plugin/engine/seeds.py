"""One seed tree: every random draw has an address under the run's seed.

``derive(seed, "batches", client, epoch)`` depends on nothing but its arguments, so draws do not depend on
order, threads or processes, and nothing ever draws from a global generator.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *address: int | str) -> int:
    """63-bit seed of an address: the first bytes of SHA-256 over the seed and the address."""
    text = "/".join([str(seed), *(f"{type(part).__name__[0]}{part}" for part in address)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_generator(seed: int, *address: int | str) -> np.random.Generator:
    """A NumPy generator (Philox) for an address."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *address)))


def torch_generator(seed: int, *address: int | str) -> torch.Generator:
    """A torch generator on the CPU for an address."""
    return torch.Generator().manual_seed(derive(seed, *address))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU and present GPUs); restore them on exit.

    For code that is not ours: dropout, a user's trainer, random augmentation. The caller's global random
    state is the same afterwards as before.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.is_initialized()
    gpu_states = torch.cuda.get_rng_state_all() if on_gpu else []
    # Not torch.manual_seed: without a GPU in use it queues a call, with its traceback, at every seeding.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if on_gpu:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if on_gpu:
            torch.cuda.set_rng_state_all(gpu_states)
