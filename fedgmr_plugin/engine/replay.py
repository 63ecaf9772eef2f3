"""A run with real clients once more, in one process: its run log is the trace of what arrived when.

Clients are trained here; everything else (who came and went, which window took in what) is as recorded. The
model must come out the same to the bit: where it does not, a device trained something else than it was sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.course import Course
from fedgmr_plugin.engine.events import (
    ClientJoined,
    ClientLeft,
    Dispatch,
    DispatchOverdue,
    UploadArrived,
    UploadRefused,
    WindowClosed,
)
from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.server import Server

#: What a replay does not repeat: sizes of messages and the day's clock.
_FREE = frozenset({"bytes_up", "bytes_down", "server_bytes_down", "wall_seconds", "message", "rejected"})
#: Records that follow from others, which logs of older releases lack.
_IMPLIED = frozenset({"layers"})
#: Refusals that leave the dispatch in flight.
_UNANSWERED = frozenset({"GMR-401", "GMR-406"})


@dataclass
class Comparison:
    """What a replay found.

    Attributes:
        records: compared.
        differences: of the first record that differs, as ``key: recorded, replayed``; empty if none does.
        where: that record, in words.
        end: the replay's own `end` record, None if the log ends before.
    """

    records: int = 0
    differences: list[str] = field(default_factory=list)
    where: str = ""
    end: dict[str, Any] | None = None


class Replay(Course):
    """One run, replayed.

    Args:
        server: not started yet, made as the recorded one was.
        examiner: measures its models.
        train: trains a dispatch as its client did.
    """

    def __init__(self, server: Server, examiner: Examiner, train: Callable[[Dispatch], LocalUpdate]) -> None:
        super().__init__(server, examiner, self._keep)
        self.found = Comparison()
        self._train = train
        self._sent: dict[int, Dispatch] = {}
        self._expected: list[Mapping[str, Any]] = []
        self._replayed: list[dict[str, Any]] = []

    def run(self, records: Iterable[Mapping[str, Any]]) -> Comparison:
        """Replay the records of a log, in order; stops at the first that differs."""
        self.server.away.update(range(len(self.server.counts)))
        self._carry_out(self.server.start())
        segment: list[Mapping[str, Any]] = []
        for record in records:
            segment.append(record)
            if record["type"] == "window":
                self._replay(segment)
                segment = []
            if self.found.differences:
                return self.found
        self._replay(segment)
        return self.found

    def _replay(self, segment: list[Mapping[str, Any]]) -> None:
        """The records up to a window's close; uploads are logged there, but count from their arrival on."""
        uploads = sorted((r for r in segment if r["type"] == "arrival"), key=lambda r: float(r["time"]))
        for record in segment:
            kind = record["type"]
            if kind in ("header", "end", *_IMPLIED) or self.found.differences:
                continue
            self._expected.append(record)
            if kind in ("client", "window"):
                until = record["time"] if kind == "client" else record["close"]
                while uploads and uploads[0]["time"] <= until:
                    self._arrive(uploads.pop(0))
            if kind == "client":
                self._carry_out(self.server.handle(_client_event(record)))
            elif kind == "rejected":
                self._carry_out(self._refused(record))
            elif kind == "window":
                self.found.end = self._close(record)
            self._match()

    def _arrive(self, arrival: Mapping[str, Any]) -> None:
        sent = self._sent.pop(int(arrival["dispatch"]), None)
        if sent is None:
            self._differ(arrival, [f"dispatch: {arrival['dispatch']} was never made"])
            return
        self.server.handle(_upload(arrival, self._train(sent)))

    def _refused(self, record: Mapping[str, Any]) -> list[Any]:
        dispatch, client = int(record["dispatch"]), int(record["client"])
        if record["code"] in _UNANSWERED:
            self._expected.pop()
            return []
        return self.server.handle(UploadRefused(dispatch, client, 0.0, record["code"], record["message"]))

    def _close(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        totals = {
            key: record[key] for key in ("bytes_up", "bytes_down", "server_bytes_down", "learning_rate")
        }
        effects = self.server.handle(WindowClosed(record["start"], record["close"], record["end"]))
        for effect in effects:
            fields = getattr(effect, "fields", {})
            if fields.get("type") == "window":
                fields.update(totals)
        in_flight = self.server.flights
        self._sent = {d: sent for d, sent in self._sent.items() if d in in_flight}
        return self._carry_out(effects)

    def _send(self, sent: Dispatch) -> float:
        self._sent[sent.dispatch] = sent
        return 0.0

    # -- comparing ------------------------------------------------------------------------------------

    def _keep(self, record: dict[str, Any]) -> None:
        if record["type"] not in _IMPLIED:
            self._replayed.append(record)

    def _match(self) -> None:
        """Hold the replayed records against the recorded ones, as far as there are both."""
        while self._expected and self._replayed and not self.found.differences:
            recorded, replayed = self._expected.pop(0), self._replayed.pop(0)
            self.found.records += 1
            keys = [key for key in recorded if key not in _FREE]
            differences = [
                f"{key}: recorded {recorded[key]}, replayed {replayed.get(key)}"
                for key in keys
                if not _same(recorded[key], replayed.get(key))
            ]
            if differences:
                self._differ(recorded, differences)

    def _differ(self, record: Mapping[str, Any], differences: list[str]) -> None:
        self.found.differences = differences
        self.found.where = f"{record['type']} record of window {record.get('window', record.get('version'))}"


def _same(recorded: Any, replayed: Any) -> bool:
    """Whether a replayed value is the recorded one; a log writes null for what is not finite."""
    if isinstance(replayed, float) and not math.isfinite(replayed):
        return recorded is None
    if isinstance(replayed, (list, tuple)):
        return (
            isinstance(recorded, list)
            and len(recorded) == len(replayed)
            and all(map(_same, recorded, replayed))
        )
    if isinstance(replayed, Mapping):
        return isinstance(recorded, Mapping) and all(_same(recorded.get(k), v) for k, v in replayed.items())
    return bool(recorded == replayed)


def _client_event(record: Mapping[str, Any]) -> ClientJoined | ClientLeft | DispatchOverdue:
    client, time = int(record["client"]), record["time"]
    if record["state"] in ("joined", "restarted"):
        fresh = record["state"] == "restarted"
        return ClientJoined(client, time, record["density"], record["samples"], fresh)
    if record["state"] == "left":
        return ClientLeft(client, time)
    return DispatchOverdue(int(record["dispatch"]), time)


def _upload(arrival: Mapping[str, Any], update: LocalUpdate) -> UploadArrived:
    stats = update.stats
    return UploadArrived(
        dispatch=int(arrival["dispatch"]),
        client=int(arrival["client"]),
        values_S=update.values_S,
        samples=stats.samples,
        time=arrival["time"],
        bytes_up=arrival["bytes_up"],
        steps=stats.steps,
        train_loss=stats.train_loss,
        drift_sq=stats.drift_sq,
        change_sq=update.change_sq,
    )
