"""Models measured for the server: on validation data for triggers and model choice, and on the test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from torch import Tensor

from fedgmr_plugin.engine.events import Validated
from fedgmr_plugin.engine.samples import Batch, Samples, in_batches
from fedgmr_plugin.engine.server import Server
from fedgmr_plugin.engine.trainer import Metrics
from fedgmr_plugin.engine.workbench import Evaluator, Workbench
from fedgmr_plugin.errors import DataError

Which = Literal["global", "scaled"]
_BATCH = 512


class Examiner:
    """Measures a server's models.

    Args:
        server: whose models.
        bench: where they are measured; its clients hold the validation data.
        test_batches: gives the test set, once per model that is evaluated.
        evaluate: how models are measured on the test set; as the trainer does by default.
    """

    def __init__(
        self,
        server: Server,
        bench: Workbench,
        test_batches: Callable[[], Iterable[Batch]],
        evaluate: Evaluator | None = None,
    ) -> None:
        self.server, self.bench, self.clients = server, bench, bench.clients
        self._test_batches = test_batches
        self._evaluator = evaluate or bench.training.trainer.evaluate

    def evaluation(self, bytes_up: float, bytes_down: float) -> dict[str, Any]:
        """The `evaluation` record of the present models on the test set."""
        metrics = self._both(self._test_batches, self._evaluator)
        shipped = metrics[self.server.candidate]
        return {
            "type": "evaluation",
            "window": self.server.version,
            "time": self.server.time,
            "candidate": self.server.candidate,
            "accuracy": shipped.accuracy,
            "loss": shipped.loss,
            "global": _short(metrics["global"]),
            "scaled": _short(metrics["scaled"]),
            "samples": shipped.samples,
            "bytes_up": bytes_up,
            "bytes_down": bytes_down,
            "metrics": dict(shipped.extra),
        }

    def validation(self) -> tuple[Validated, dict[str, Any] | None]:
        """The present models on the validation data, without the gradient's votes; and the record of it.

        No record where nothing is held out.

        Raises:
            DataError: GMR-305 if the first of them lacks the metric that a plateau is looked for in.
        """
        server, metric = self.server, self.server.config.trigger_metric
        if not self.clients.anything_held_out:
            return Validated(server.candidate, None, ()), None
        both = self._both(self._validation_batches)
        candidate = self.choose(both)
        clients = self._client_metrics()
        record = {
            "type": "validation",
            "window": server.version,
            "time": server.time,
            "global": _short(both["global"]),
            "scaled": _short(both["scaled"]),
            "clients": [None if c is None else _short(c) for c in clients],
            "candidate": candidate,
        }
        of_clients = [None if c is None else getattr(c, metric) for c in clients]
        of_server = getattr(both[candidate], metric)
        if of_server is None and self._is_watched():
            raise DataError(
                "GMR-305", f"trigger_metric={metric}, and the trainer's test gave none", where="validation"
            )
        return Validated(candidate, of_server, of_clients), record

    def _is_watched(self) -> bool:
        """Whether this is the first look for a plateau, and there is something to restore."""
        gmr = self.server.gmr
        looks = self.server.config.trigger in ("plateau", "mixed")
        return looks and gmr.checks == 0 and min(gmr.densities) < 1.0

    def choose(self, both: dict[Which, Metrics]) -> Which:
        """The model to ship: fixed by `evaluate`, or the better one on the validation split."""
        config = self.server.config
        if config.evaluate != "validation":
            return self.server.candidate
        plain, scaled = (getattr(both[w], config.trigger_metric) for w in ("global", "scaled"))
        if plain is None or scaled is None:
            return "scaled"
        better = plain > scaled if config.trigger_metric == "accuracy" else plain < scaled
        return "global" if better else "scaled"

    def _both(
        self, batches: Callable[[], Iterable[Batch]], evaluate: Evaluator | None = None
    ) -> dict[Which, Metrics]:
        """Metrics of w and of the coverage-scaled model."""
        plain = self.bench.measure(self.server.model("global"), batches(), evaluate)
        if min(self.server.gmr.densities) >= 1.0:
            return {"global": plain, "scaled": plain}
        return {
            "global": plain,
            "scaled": self.bench.measure(self.server.model("scaled"), batches(), evaluate),
        }

    def _held_out(self) -> list[Samples | None]:
        return [self.clients.validation(n) for n in range(self.clients.count)]

    def _validation_batches(self) -> Iterator[Batch]:
        """Everybody's validation data, once where clients share them."""
        for held_out in {id(part): part for part in self._held_out()}.values():
            if held_out is not None:
                yield from in_batches(held_out, _BATCH)

    def _client_metrics(self) -> list[Metrics | None]:
        """Metrics of each m_n w on its client's validation samples [N]."""
        known: dict[tuple[int, int], Metrics] = {}
        found: list[Metrics | None] = []
        ranking = self.server.ranking
        for held_out, density in zip(self._held_out(), self.server.gmr.densities, strict=True):
            if held_out is None:
                found.append(None)
                continue
            rung = ranking.rung(density)
            key = id(held_out), rung
            if key not in known:
                masked_D: Tensor = self.server.w_D * ranking.mask(rung)
                known[key] = self.bench.measure(masked_D, in_batches(held_out, _BATCH))
            found.append(known[key])
        return found


def _short(metrics: Metrics) -> dict[str, float | None]:
    return {"accuracy": metrics.accuracy, "loss": metrics.loss}
