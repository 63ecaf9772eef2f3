"""How many bytes a simulated dispatch and its upload would take as messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.network import Transfer
from fedgmr_plugin.protocol.header import Header, Outcome, Task
from fedgmr_plugin.protocol.mask import Mask
from fedgmr_plugin.protocol.wire import encoded_length

_RUN = "run-0000"


class MessageSizes:
    """Measures the messages of a run, in the order of its dispatches.

    A client's first dispatch under a ranking, or beyond the rung that it knows, carries the mask; later ones
    its digest. An upload carries values only: the server issued the mask. Uploads are measured with an
    outcome of three numbers of full length, and every header has a run's name of eight letters: what a run
    is called must not change its clock.

    Args:
        dtype: type in which values travel; the model's own by default.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._known: dict[int, tuple[str, int]] = {}  # client to the ranking and rung of its last mask
        self._masks: dict[tuple[str, int], int] = {}  # (ranking, rung) to the bytes of the mask

    def state(self) -> dict[str, Any]:
        """JSON-able state; `load_state` restores it."""
        return {"known": [[client, *mask] for client, mask in self._known.items()]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._known = {client: (digest, rung) for client, digest, rung in state["known"]}

    def forget_clients(self) -> None:
        """As if no client knew a mask: masks travel again, of the same size."""
        self._known.clear()

    def __call__(self, sent: Dispatch) -> Transfer:
        """MB of the message to the client and of the client's answer."""
        ranking, rung = sent.ranking, sent.rung
        mask_bytes = 0
        if self._known.get(sent.client) != (ranking.digest, rung):
            if (ranking.digest, rung) not in self._masks:
                self._masks = {k: v for k, v in self._masks.items() if k[0] == ranking.digest}
                self._masks[ranking.digest, rung] = len(Mask.of(ranking, (rung,)).code)
            mask_bytes = self._masks[ranking.digest, rung]
            self._known[sent.client] = ranking.digest, rung
        down = Header(
            kind="dispatch",
            run=_RUN,
            version=sent.version,
            ranking=ranking.digest,
            size=ranking.rung_D.numel(),
            cuts=(ranking.ends[rung],),
            dtype=self._dtype or sent.values_S.dtype,
            mask_bytes=mask_bytes,
            client=sent.client,
            dispatch=sent.dispatch,
            task=Task(sent.density, sent.count, sent.learning_rate_scale),
        )
        outcome = Outcome(1.0, 1, *[0.1 + 0.2] * 3)
        up = replace(down, kind="update", mask_bytes=0, task=None, outcome=outcome)
        return Transfer(encoded_length(down) / 1e6, encoded_length(up) / 1e6)
