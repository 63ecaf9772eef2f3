"""What goes into the server's state machine and what comes out.

A runtime turns the world (a virtual clock, ranks, devices) into events, hands each to
`fedgmr_plugin.engine.server.Server.handle`, and carries out the effects that come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fedgmr_plugin.kernels.masks import Ranking

# -- events ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UploadArrived:
    """A client's update has fully arrived.

    Attributes:
        dispatch: number of the dispatch that it answers.
        client: who sent it.
        values_S: one value per coordinate of the dispatched sub-model, in payload order; changes of
            parameters in the delta form, else weights; buffers always as values.
        samples: training samples processed, > 0.
        time: seconds at which the last byte arrived.
        bytes_up: size of the upload, bytes.
        sent_S: bool [S], the coordinates that `values_S` has, where it does not have all of them.
        steps, train_loss, drift_sq, change_sq: see the run log's `arrival` record.
    """

    dispatch: int
    client: int
    values_S: Tensor
    samples: float
    time: float
    bytes_up: float = 0.0
    sent_S: Tensor | None = None
    steps: int = 0
    train_loss: float | None = None
    drift_sq: float | None = None
    change_sq: float | None = None


@dataclass(frozen=True)
class ClientJoined:
    """A client can be reached and may be dispatched to.

    Attributes:
        client: its number.
        time: second at which it was heard of.
        density: initial density, where it was measured and nothing was dispatched to the client yet.
        samples: its training samples, where it said so.
        fresh: it has lost what it was sent before, so late answers to that are not waited for any more.
    """

    client: int
    time: float
    density: float | None = None
    samples: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class ClientLeft:
    """A client cannot be reached: nothing is dispatched to it; what it trains may still arrive."""

    client: int
    time: float


@dataclass(frozen=True)
class DispatchOverdue:
    """A dispatch was not answered in time: its slot is free, and its client counts as away.

    An answer that arrives later is still merged, with the weight of its staleness.
    """

    dispatch: int
    time: float


@dataclass(frozen=True)
class UploadRefused:
    """A client answered its dispatch with something that could not be read; the dispatch is over.

    Attributes:
        code, message: of the error.
    """

    dispatch: int
    client: int
    time: float
    code: str
    message: str


@dataclass(frozen=True)
class WindowClosed:
    """The window is over: merge what has arrived. Times in seconds, `end` includes the aggregation."""

    start: float
    close: float
    end: float


@dataclass(frozen=True)
class Validated:
    """Answer to `Validate`: metrics on the validation split; None where unknown.

    Attributes:
        candidate: which model would be shipped now.
        server: the trigger's metric of that model.
        clients: the trigger's metric of each client's sub-model [N].
        gradient: whether restoring client n pays [N]; empty without the ``gradient`` trigger.
    """

    candidate: Literal["global", "scaled"]
    server: float | None
    clients: Sequence[float | None]
    gradient: Sequence[bool] = ()


Event = UploadArrived | UploadRefused | ClientJoined | ClientLeft | DispatchOverdue | WindowClosed | Validated

# -- effects -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dispatch:
    """Send a sub-model to a client.

    Attributes:
        dispatch: its number, increasing from 0.
        client: receiver.
        version: windows merged so far, s.
        count: dispatches made to this client before.
        density: d_n.
        ranking: family that the mask was cut from.
        rung: the mask within it.
        values_S: w_s on the support, in payload order; shared by the dispatches of one rung, so read-only.
        learning_rate_scale: factor on the clients' learning rate in this window (warm-up).
        form: of the update, where the server is elsewhere and says so; else as the configuration has it.
    """

    dispatch: int
    client: int
    version: int
    count: int
    density: float
    ranking: Ranking
    rung: int
    values_S: Tensor
    learning_rate_scale: float = 1.0
    form: Literal["delta", "replacement"] | None = None

    @property
    def index_S(self) -> Tensor:
        """int64 [S]: coordinates of the sub-model, in payload order."""
        return self.ranking.support(self.rung)


@dataclass(frozen=True)
class Validate:
    """Measure the models on the validation split and answer with `Validated`."""


@dataclass(frozen=True)
class Evaluate:
    """Measure the models on the test set; `last` after the last window. Nothing is answered."""

    last: bool = False


@dataclass(frozen=True)
class Record:
    """One record of the run log."""

    fields: dict[str, Any]


@dataclass(frozen=True)
class Finish:
    """The run is over."""

    reason: Literal["windows", "time_budget"]


Effect = Dispatch | Validate | Evaluate | Record | Finish
