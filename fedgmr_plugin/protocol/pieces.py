"""A dispatch to a real device as objects in a store: each increment and each mask once, for everybody.

Legend: k segments of a ranking's payload order (`fedgmr_plugin.protocol.messages.PayloadOrder.by_rung`).

The sub-model of a rung is the first increments of its version, so what all devices of a window need is
uploaded once (IMS, method page section 7): the server's uplink carries the largest sub-model, not the sum.
A mask travels as its packed code, once for each ranking; a device that holds it does not fetch it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from typing import Any, NamedTuple

import torch

from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol.mask import Mask
from fedgmr_plugin.protocol.messages import PayloadOrder, increment_messages
from fedgmr_plugin.protocol.storekeys import sent_key
from fedgmr_plugin.protocol.wire import encode


class Piece(NamedTuple):
    """One object of a store.

    Attributes:
        key: its name.
        size: its length, bytes; the most that is taken where `sha256` is empty.
        sha256: of its content, hex; empty where it was not announced.
    """

    key: str
    size: int
    sha256: str


class Parcel(NamedTuple):
    """What a dispatch is made of.

    Attributes:
        values: increments from place 0, in order.
        masks: packed mask of each, in order.
        new: objects that were not in the store yet, with their content.
        received: bytes that the client fetches: all increments, and the masks that it does not hold.
    """

    values: tuple[Piece, ...]
    masks: tuple[Piece, ...]
    new: tuple[tuple[Piece, memoryview], ...]
    received: int


class Pieces:
    """The objects of a run.

    Args:
        run: FedML's ``run_id``.
        token: name of this run that no other has; in every key, and in every message.
        dtype: type in which values travel; the model's own by default.
    """

    def __init__(self, run: str, token: str, dtype: torch.dtype | None = None) -> None:
        self._run, self._token, self.dtype = run, token, dtype
        self._values: dict[tuple[int, str], list[Piece]] = {}  # (version, ranking) to its increments
        self._masks: dict[str, list[Piece]] = {}  # ranking to its masks
        self._held: dict[int, tuple[str, int]] = {}  # client to the ranking and segments of its masks

    def of(self, sent: Dispatch) -> Parcel:
        """The objects of a dispatch; those of its version and ranking that are missing are made."""
        order = PayloadOrder.by_rung(sent.ranking, sent.rung)
        count, digest = len(order.tops), sent.ranking.digest
        new: list[tuple[Piece, memoryview]] = []
        masks = self._masks.setdefault(digest, [])
        for k in range(len(masks), count):
            held = order.tops[k - 1] if k else None
            code = Mask.of(sent.ranking, (order.tops[k],), held).code
            new.append(self._object(f"mask-{digest}-{k}", memoryview(code)))
            masks.append(new[-1][0])
        values = self._values.setdefault((sent.version, digest), [])
        if len(values) < count:
            messages = increment_messages(
                sent.values_S, order, run=self._token, version=sent.version, dtype=self.dtype
            )
            for k in range(len(values), count):
                new.append(self._object(f"values-{sent.version}-{digest}-{k}", encode(messages[k])))
                values.append(new[-1][0])
        ranking, segments = self._held.get(sent.client, ("", 0))
        known = segments if ranking == digest else 0
        self._held[sent.client] = digest, max(known, count)
        received = sum(p.size for p in values[:count]) + sum(p.size for p in masks[known:count])
        return Parcel(tuple(values[:count]), tuple(masks[:count]), tuple(new), received)

    def found(self, version: int, ranking: Ranking, rung: int) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Increments and masks of a dispatch that was made before."""
        count = len(PayloadOrder.by_rung(ranking, rung).tops)
        values, masks = self._values[version, ranking.digest], self._masks[ranking.digest]
        return tuple(values[:count]), tuple(masks[:count])

    def forget_client(self, client: int) -> None:
        """The client holds no mask any more: it was started again."""
        self._held.pop(client, None)

    @property
    def keys(self) -> frozenset[str]:
        """Names of the objects that are needed now."""
        lists = (*self._values.values(), *self._masks.values())
        return frozenset(piece.key for pieces in lists for piece in pieces)

    def drop_unused(self, used: Container[tuple[int, str]]) -> list[str]:
        """Forget versions that no dispatch in `used` (version, ranking) needs; returns keys to delete."""
        gone = [key for key in self._values if key not in used]
        keys = [piece.key for key in gone for piece in self._values.pop(key)]
        rankings = {digest for _, digest in self._values}
        for digest in [d for d in self._masks if d not in rankings]:
            keys += [piece.key for piece in self._masks.pop(digest)]
        return keys

    def _object(self, name: str, content: memoryview) -> tuple[Piece, memoryview]:
        digest = hashlib.sha256(content).hexdigest()
        return Piece(sent_key(self._run, self._token, name), len(content), digest), content

    # -- state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able state; `load_state` restores it."""
        return {
            "values": [[*key, pieces] for key, pieces in self._values.items()],
            "masks": [[digest, pieces] for digest, pieces in self._masks.items()],
            "held": [[client, *mask] for client, mask in self._held.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._values = {(v, digest): [Piece(*p) for p in pieces] for v, digest, pieces in state["values"]}
        self._masks = {digest: [Piece(*p) for p in pieces] for digest, pieces in state["masks"]}
        self._held = {client: (digest, count) for client, digest, count in state["held"]}


def local_ranking(cuts: tuple[int, ...], codes: list[Mask], size: int, density: float) -> Ranking:
    """A device's own view of the ranking: the segments that it holds, and the rest of the model behind them.

    Args:
        cuts: ends of the segments.
        codes: the mask of each segment, as unpacked.
        size: coordinates of the model, D.
        density: of the sub-model; the segments before the last get stand-ins below it.

    Raises:
        WireError: GMR-719 if the masks have other lengths.
    """
    rung_D = torch.full((size,), len(cuts), dtype=torch.int16)
    free = torch.arange(size)
    for k, mask in enumerate(codes):
        member = torch.from_numpy(mask.segment_F == 0)
        rung_D[free[member]] = k
        free = free[~member]
    below = [density * (k + 1) / (len(cuts) + 1) for k in range(len(cuts) - 1)]
    ranking = Ranking((*below, density), rung_D)
    if ranking.ends != tuple(cuts):
        raise WireError("GMR-719", f"the masks have cuts={ranking.ends[:8]} instead of {cuts[:8]}")
    return ranking
