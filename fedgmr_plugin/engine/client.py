"""A client's work on one dispatch: place the sub-model, train it, cut the update.

Legend: D coordinates of the global vector, S support of the sub-model.

x_0 = m * w_s; K masked SGD steps x <- x - eta m grad f(x; batch); the update holds x_K (or x_K - x_0) on the
support of m. See the method page, section 4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.compact import Masks
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.objectives import Context
from fedgmr_plugin.engine.samples import BatchList, BatchPlan, Samples
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.trainer import LocalStats, LocalTrainer
from fedgmr_plugin.kernels.blocks import sum_sq
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.kernels.rounding import travelled

#: Masks are kept for the next client of their density up to this many bytes; making them is a pass over D.
_KEPT_BYTES = 2**24
#: Coordinates of a mask that are looked at first.
_PEEK = 2**12


class LocalUpdate(NamedTuple):
    """A trained dispatch: `values_S` and `change_sq` as in `fedgmr_plugin.engine.events.UploadArrived`."""

    dispatch: int
    client: int
    values_S: Tensor
    change_sq: float
    stats: LocalStats


def train_dispatch(
    sent: Dispatch,
    *,
    model: nn.Module,
    layout: ModelLayout,
    trainer: LocalTrainer,
    samples: Samples,
    plan: BatchPlan,
    learning_rate: float,
    form: Literal["delta", "replacement"],
    on_step: Callable[[], None] | None = None,
    interrupt: Callable[[], None] | None = None,
    recent: RecentMasks | None = None,
    room_D: Tensor | None = None,
    payload_dtype: torch.dtype | None = None,
    context: Callable[[Dispatch, nn.Module, RecentMasks], Context] | None = None,
) -> LocalUpdate:
    """Carry out one dispatch on `model`, whose content is of no use afterwards.

    `on_step` is called before each batch is read; with the built-in trainer `model` then holds x_k.
    `interrupt` is called then, too, and does not look at the model; what it raises ends the training.
    `recent` shares masks among calls. `room_D` is a vector [D] to be overwritten, instead of a new one.
    `payload_dtype` is the type in which the update travels. `context` makes that of the local objective
    from a model that holds x_0; the objective is the plain one without it.

    The result depends on `sent`, the client's samples, the plan and the seed only: all global random
    generators are seeded for this dispatch and restored afterwards.
    """
    if room_D is None:
        x_D = torch.zeros(layout.size, dtype=layout.dtype, device=sent.values_S.device)
    else:
        x_D = room_D if len(sent.values_S) == layout.size else room_D.zero_()
    sent.ranking.place(sent.values_S, x_D)
    recent = recent or RecentMasks(layout)
    batches = BatchList(
        samples, list(plan.batches(sent.client, len(samples), sent.count)), on_step, interrupt
    )
    with layout.placed(model, x_D):
        masks = recent(sent.ranking, sent.rung)
        beside = {} if context is None else {"context": context(sent, model, recent)}
        with isolated_rng(derive(plan.seed, "training", sent.client, sent.count)):
            stats = trainer.train(
                model,
                batches,
                masks,
                learning_rate=learning_rate * sent.learning_rate_scale,
                client=sent.client,
                **beside,
            )
    return cut_update(sent, x_D, layout, form, payload_dtype, stats)


def cut_update(
    sent: Dispatch,
    x_D: Tensor,
    layout: ModelLayout,
    form: Literal["delta", "replacement"],
    payload_dtype: torch.dtype | None,
    stats: LocalStats,
) -> LocalUpdate:
    """The update of a dispatch whose training ended at x_K (method page, section 4).

    Args:
        x_D: x_K in the layout's order [D].
        form: whether parameters travel as x_K - x_0 or as x_K; buffers always travel as they are.
        payload_dtype: type in which the update travels; None is the model's own.
    """
    values_S = sent.ranking.cut(x_D, sent.rung)
    parts = parameter_parts(sent.ranking, layout)
    if form == "delta":
        for part in parts:
            values_S[part] -= sent.values_S[part]
    values_S = travelled(values_S, payload_dtype)
    change_sq = sum_sq(values_S, None if form == "delta" else sent.values_S, parts)
    return LocalUpdate(sent.dispatch, sent.client, values_S, change_sq, stats)


def parameter_parts(ranking: Ranking, layout: ModelLayout) -> list[slice]:
    """Where a payload [S] holds parameters: buffers are the last of rung 0, and never travel as changes."""
    buffers, stop = layout.size - layout.parameters, ranking.ends[0]
    return [slice(0, stop - buffers), slice(stop, None)] if buffers else [slice(None)]


def parameter_masks(layout: ModelLayout, mask_D: Tensor) -> dict[str, Tensor] | None:
    """bool mask of each parameter that has a masked coordinate; None if there is none."""
    entries = [e for e in layout.entries if e.kind != "buffer"]
    full = _are_full([mask_D[e.slice] for e in entries])
    masked = [e for e, is_full in zip(entries, full, strict=True) if not is_full]
    return Masks((e.name, mask_D[e.slice].view(e.shape)) for e in masked) or None


def _are_full(masks: Sequence[Tensor]) -> list[bool]:
    """Which flat masks hold everything; one that does not has a hole near its beginning, mostly."""
    if masks[0].device.type == "cpu":
        return [bool(mask[:_PEEK].all()) and bool(mask[_PEEK:].all()) for mask in masks]
    full: list[bool] = torch.stack([mask.all() for mask in masks]).tolist()
    return full


class RecentMasks:
    """`parameter_masks` of the rungs used last: clients of one density share the work.

    Kept are up to eight of one layout's, fewer of a large one (`_KEPT_BYTES`), at least the last.
    """

    def __init__(self, layout: ModelLayout) -> None:
        self._layout, self._most = layout, min(max(_KEPT_BYTES // layout.size, 1), 8)
        self._known: OrderedDict[tuple[str, int], dict[str, Tensor] | None] = OrderedDict()

    def __call__(self, ranking: Ranking, rung: int) -> dict[str, Tensor] | None:
        """The masks of a rung; the dict is the caller's own."""
        if ranking.ends[rung] == self._layout.size:
            return None
        key = ranking.digest, rung
        if key not in self._known:
            while len(self._known) >= self._most:
                self._known.popitem(last=False)
            self._known[key] = parameter_masks(self._layout, ranking.mask(rung))
        self._known.move_to_end(key)
        masks = self._known[key]
        return None if masks is None else masks.copy()
