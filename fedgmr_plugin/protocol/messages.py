"""The engine's effects and events as messages, and back.

Legend: S places of one payload. The engine's payloads are in the order of the ranking, rung by rung; on the
wire rungs may be merged to one segment, which a new mask needs fewer bytes for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedgmr_plugin.engine.events import Dispatch, UploadArrived
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol.header import Header, Outcome, Task
from fedgmr_plugin.protocol.mask import Mask
from fedgmr_plugin.protocol.wire import Message, encoded_length


@dataclass(frozen=True, eq=False)
class PayloadOrder:
    """The order in which one client receives and sends the coordinates of its sub-model.

    Attributes:
        ranking: the family of masks.
        tops: ascending last rung of each segment; the last is the client's rung. Coordinates increase
            within a segment.
    """

    ranking: Ranking
    tops: tuple[int, ...]

    @staticmethod
    def by_rung(ranking: Ranking, rung: int) -> PayloadOrder:
        """The ranking's own order: a segment for each rung that is not empty. A sub-model is a slice."""
        ends = ranking.ends
        tops = (r for r in range(rung + 1) if ends[r] > (ends[r - 1] if r else 0))
        return PayloadOrder(ranking, tuple(tops))

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Ends of the segments, as in `Header`."""
        return tuple(self.ranking.ends[top] for top in self.tops)

    @cached_property
    def permutation(self) -> Tensor | None:
        """int64 [S]: place in the ranking's order of each place of this one; None where they are equal."""
        if self.cuts == PayloadOrder.by_rung(self.ranking, self.tops[-1]).cuts:
            return None
        index_S = self.ranking.support(self.tops[-1])
        bounds = itertools.pairwise((0, *self.cuts))
        return torch.cat([index_S[a:b].argsort() + a for a, b in bounds])

    def from_ranked(self, values_S: Tensor) -> Tensor:
        """The engine's payload in this order."""
        return values_S if self.permutation is None else values_S.index_select(0, self.permutation)

    def to_ranked(self, values_S: Tensor) -> Tensor:
        """A payload of this order in the engine's."""
        if self.permutation is None:
            return values_S
        return torch.empty_like(values_S).index_copy_(0, self.permutation, values_S)


def dispatch_message(
    effect: Dispatch,
    order: PayloadOrder,
    *,
    run: str,
    held: int = 0,
    mask: Mask | None = None,
    dtype: torch.dtype | None = None,
) -> Message:
    """A dispatch to one client.

    Args:
        order: payload order of its sub-model; its last rung is the dispatch's.
        held: places that reach the client by increments of the same version: 0 or one of the cuts.
        mask: `Mask.of` the same segments; None where the client knows them.
        dtype: type of the values on the wire; the model's own by default.
    """
    payload_S = order.from_ranked(effect.values_S)
    header = Header(
        kind="dispatch",
        run=run,
        version=effect.version,
        ranking=order.ranking.digest,
        size=order.ranking.rung_D.numel(),
        cuts=tuple(cut for cut in order.cuts if cut > held),
        start=held,
        dtype=dtype or payload_S.dtype,
        mask_bytes=len(mask.code) if mask else 0,
        client=effect.client,
        dispatch=effect.dispatch,
        task=Task(effect.density, effect.count, effect.learning_rate_scale),
    )
    return Message(header, payload_S[held:], mask)


def dispatched(message: Message, ranking: Ranking) -> Dispatch:
    """A dispatch's effect on the client's side, from a message with the whole payload in the ranking's order.

    Raises:
        WireError: GMR-714 not a dispatch, GMR-715 of another ranking, or not its whole payload in its order.
    """
    header = message.header
    if header.task is None or header.client is None or header.dispatch is None:
        raise WireError("GMR-714", f"kind={header.kind} is no dispatch")
    if header.ranking != ranking.digest or header.task.density not in ranking.densities:
        raise WireError("GMR-715", f"ranking={header.ranking} at density={header.task.density} is not known")
    rung = ranking.rung(header.task.density)
    if header.start or header.cuts != PayloadOrder.by_rung(ranking, rung).cuts:
        raise WireError(
            "GMR-715", f"start={header.start} with cuts={header.cuts[:8]} is not the whole payload"
        )
    return Dispatch(
        header.dispatch,
        header.client,
        header.version,
        header.task.count,
        header.task.density,
        ranking,
        rung,
        message.values,
        header.task.learning_rate_scale,
    )


def increment_messages(
    payload_S: Tensor,
    order: PayloadOrder,
    *,
    run: str,
    version: int,
    masks: Sequence[Mask | None] = (),
    dtype: torch.dtype | None = None,
) -> list[Message]:
    """One increment for each segment, sent once to all clients that hold it.

    Args:
        payload_S: values in this order, of at least the last cut's length.
        masks: one for each segment; empty where every receiver knows them.
    """
    messages = []
    for place, (start, stop) in enumerate(itertools.pairwise((0, *order.cuts))):
        mask = masks[place] if masks else None
        header = Header(
            kind="increment",
            run=run,
            version=version,
            ranking=order.ranking.digest,
            size=order.ranking.rung_D.numel(),
            cuts=(stop,),
            start=start,
            dtype=dtype or payload_S.dtype,
            mask_bytes=len(mask.code) if mask else 0,
        )
        messages.append(Message(header, payload_S[start:stop], mask))
    return messages


def update_message(
    answered: Header,
    cuts: Sequence[int],
    values_S: Tensor,
    outcome: Outcome,
    *,
    dtype: torch.dtype | None = None,
) -> Message:
    """A client's answer to a dispatch. The mask never travels back: the server issued it.

    Args:
        answered: header of the dispatch.
        cuts: all segments of the payload, those that came by increments included.
        values_S: one value for each place of the payload.
        outcome: numbers of it that are not finite are left out.
    """
    header = Header(
        kind="update",
        run=answered.run,
        version=answered.version,
        ranking=answered.ranking,
        size=answered.size,
        cuts=tuple(cuts),
        dtype=dtype or values_S.dtype,
        client=answered.client,
        dispatch=answered.dispatch,
        outcome=Outcome(
            outcome.samples,
            outcome.steps,
            _finite(outcome.train_loss),
            _finite(outcome.drift_sq),
            _finite(outcome.change_sq),
        ),
    )
    return Message(header, values_S)


def upload(message: Message, order: PayloadOrder, *, dtype: torch.dtype, time: float) -> UploadArrived:
    """An update as the server's event; whether it may be merged is for admission to say.

    Args:
        order: payload order of the dispatch that it answers.
        dtype: type of the global vector.
        time: seconds at which the last byte arrived.

    Raises:
        WireError: GMR-714 not an update, GMR-715 of another ranking or payload order.
    """
    header = message.header
    if header.outcome is None or header.client is None or header.dispatch is None:
        raise WireError("GMR-714", f"kind={header.kind} is no update")
    if header.ranking != order.ranking.digest or header.cuts != order.cuts:
        raise WireError("GMR-715", f"ranking={header.ranking} with cuts={header.cuts[:8]} was not dispatched")
    return UploadArrived(
        dispatch=header.dispatch,
        client=header.client,
        values_S=order.to_ranked(message.values.to(dtype)),
        time=time,
        bytes_up=encoded_length(header),
        **vars(header.outcome),
    )


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
