"""Ranks of torch.distributed: heads through gloo, values through NCCL where each rank has its own GPU."""

from __future__ import annotations

import re
import socket
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedgmr_plugin.runtimes.distributed.channel import Frame, Gone, head_bytes, head_of

#: Bytes of the vector in which a head travels; what does not fit follows in another one.
_HEAD = 2048
_LENGTH = 4


class TorchRanks:
    """The ranks of the default process group, of which this process is one.

    Every pair of ranks that talks has two directions, each used by one thread on either side.

    Args:
        device: of this rank's model.
        silence: seconds without a sign of life after which a rank is given up.

    Attributes:
        transport: how values travel, "nccl" or "gloo".
        why: what decided that, where not every rank has a GPU of its own.
    """

    def __init__(self, device: torch.device, silence: float = 300.0) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        silent = timedelta(seconds=silence)
        # Ranks may come late, as late as torch's own time for that allows; later they must not be silent.
        self._all = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self.transport, self.why = _transport(self.gather(f"{socket.gethostname()} {device}"))
        self._heads = dist.new_group(backend="gloo", timeout=silent)
        # A direction is a communicator of its own: on one, a rank that sends an update would wait for the
        # next task to be received, and the server, which sends it, for the update.
        if self.transport == "nccl":
            self._values = [dist.new_group(backend="nccl", timeout=silent) for _ in range(2)]
        else:
            self._values = [self._heads] * 2

    def gather(self, text: str) -> list[str]:
        """One text of every rank, in their order, on every rank; before any channel is used."""
        own = _bytes(text.encode() or b" ")
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(own)]), group=self._all)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(texts, padded, group=self._all)
        return [t[: int(n)].numpy().tobytes().decode() for t, n in zip(texts, lengths, strict=True)]

    def channel(self, peer: int) -> TorchChannel:
        """Messages to a rank and from it."""
        down, up = self._values
        ways = (down, up) if self.rank < peer else (up, down)
        on = self._device if self.transport == "nccl" else torch.device("cpu")
        return TorchChannel(peer, self._heads, ways, on)

    def close(self, complete: bool = True) -> None:
        """Leave the communicators on the GPU.

        Args:
            complete: whether every rank does; the others might be waited for.
        """
        if self.transport == "nccl" and complete:
            for group in self._values:
                dist.destroy_process_group(group)


def _transport(places: list[str]) -> tuple[str, str]:
    """How values travel between ranks at "host device", and why not by NCCL."""
    on_cpu = [n for n, place in enumerate(places) if not place.split()[1].startswith("cuda")]
    if on_cpu:
        return "gloo", f"rank {on_cpu[0]} has no GPU"
    shared = [n for n, place in enumerate(places) if place in places[:n]]
    if shared:
        first = places.index(places[shared[0]])
        return "gloo", f"ranks {first} and {shared[0]} share {places[first].split()[1]}"
    if not dist.is_nccl_available():
        return "gloo", "this build of torch has no NCCL"
    return "nccl", ""


class TorchChannel:
    """See `Channel`.

    Args:
        peer: the other rank.
        heads: group for heads.
        ways: groups for values: to the peer, from it.
        device: where values are when they travel.
    """

    def __init__(self, peer: int, heads: Any, ways: tuple[Any, Any], device: torch.device) -> None:
        self.name = f"rank {peer}"
        self._peer, self._heads, self._ways, self._device = peer, heads, ways, device
        self._sending = threading.Lock()

    def send(self, message: Frame) -> None:
        """See `Channel`."""
        self._enter()
        data = head_bytes(message)
        whole = _bytes((len(data).to_bytes(_LENGTH, "little") + data).ljust(_HEAD))
        try:
            with self._sending:
                dist.send(whole[:_HEAD], self._peer, group=self._heads)
                if len(whole) > _HEAD:
                    dist.send(whole[_HEAD:], self._peer, group=self._heads)
                if message.values.numel():
                    values = message.values.detach().to(self._device).contiguous().view(torch.uint8)
                    dist.send(values, self._peer, group=self._ways[0])
                    self._wait()
        except RuntimeError as error:
            raise Gone(_reason(error)) from error

    def receive(self) -> Frame:
        """See `Channel`."""
        self._enter()
        try:
            first = torch.empty(_HEAD, dtype=torch.uint8)
            dist.recv(first, self._peer, group=self._heads)
            head = first.numpy().tobytes()
            stop = _LENGTH + int.from_bytes(head[:_LENGTH], "little")
            if stop > _HEAD:
                rest = torch.empty(stop - _HEAD, dtype=torch.uint8)
                dist.recv(rest, self._peer, group=self._heads)
                head += rest.numpy().tobytes()
            fields, dtype, count = head_of(head[_LENGTH:stop])
            values = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device=self._device)
            if count:
                dist.recv(values, self._peer, group=self._ways[1])
                self._wait()
        except RuntimeError as error:
            raise Gone(_reason(error)) from error
        return Frame(fields, values.view(dtype))

    def close(self) -> None:
        """Nothing: the rank ends by itself."""

    def _enter(self) -> None:
        """Every thread has a current GPU of its own."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _wait(self) -> None:
        """Until what was asked of the GPU in this thread is done: other threads use the memory."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _reason(error: RuntimeError) -> str:
    """The first sentence of an error, without the place in torch's sources."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error)).partition(". ")[0]


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
