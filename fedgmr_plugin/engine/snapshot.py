"""A server's state as JSON-able data and tensors, at any event.

The pair (meta, tensors) holds everything that changes: a server made with the same configuration, plan and
layout continues from it to the same bits. Tensors may be written with safetensors; meta with `json`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fedgmr_plugin.engine.admission import Admitted, InFlight
from fedgmr_plugin.engine.events import UploadArrived
from fedgmr_plugin.engine.server import Server
from fedgmr_plugin.kernels.density import GMRState, Plateau
from fedgmr_plugin.kernels.masks import Ranking


class Snapshot(NamedTuple):
    """JSON-able `meta`, and `tensors` by name."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]


def snapshot(server: Server) -> Snapshot:
    """The server's state; tensors are copies."""
    tensors = {"w": server.w_D.clone()}
    if server.interval_start_D is not None:
        tensors["interval_start"] = server.interval_start_D.clone()
    rankings: dict[str, Ranking] = {}

    def flight(f: InFlight) -> dict[str, Any]:
        rankings.setdefault(f.ranking.digest, f.ranking)
        return {
            "client": f.client,
            "version": f.version,
            "density": f.density,
            "ranking": f.ranking.digest,
            "rung": f.rung,
        }

    def admitted(a: Admitted, group: str) -> dict[str, Any]:
        upload = {k: v for k, v in vars(a.upload).items() if k != "values_S"}
        tensors[f"{group}.{a.upload.dispatch}"] = a.upload.values_S.clone()
        return {"flight": flight(a.flight), "upload": upload}

    rankings[server.ranking.digest] = server.ranking
    meta: dict[str, Any] = {
        "version": server.version,
        "time": server.time,
        "phase": server.phase,
        "candidate": server.candidate,
        "dispatches": server.dispatches,
        "rejected": server.rejected,
        "counts": list(server.counts),
        "gmr": {
            "densities": list(server.gmr.densities),
            "floor": server.gmr.floor,
            "checks": server.gmr.checks,
            "server": list(server.gmr.server),
            "clients": [list(c) for c in server.gmr.clients],
        },
        "ranking": server.ranking.digest,
        "flights": [[d, flight(f)] for d, f in server.flights.items()],
        "staged": [admitted(a, "staged") for a in server.staged.values()],
        "buffer": [admitted(a, "buffer") for a in server.buffer.values()],
    }
    meta["rankings"] = {digest: list(r.densities) for digest, r in rankings.items()}
    tensors.update({f"ranking.{digest}": r.rung_D.clone() for digest, r in rankings.items()})
    return Snapshot(meta, tensors)


def restore(server: Server, state: Snapshot) -> None:
    """Put `server` into `state`."""
    meta, tensors = state
    rankings = {
        digest: Ranking(tuple(densities), tensors[f"ranking.{digest}"].clone())
        for digest, densities in meta["rankings"].items()
    }

    def flight(f: dict[str, Any]) -> InFlight:
        return InFlight(f["client"], f["version"], f["density"], rankings[f["ranking"]], f["rung"])

    def admitted(a: dict[str, Any], group: str) -> Admitted:
        values_S = tensors[f"{group}.{a['upload']['dispatch']}"].clone()
        return Admitted(flight(a["flight"]), UploadArrived(values_S=values_S, **a["upload"]))

    if "interval_start" in tensors:
        server.interval_start_D = tensors["interval_start"].clone()
    server.version, server.time = meta["version"], meta["time"]
    server.phase, server.candidate = meta["phase"], meta["candidate"]
    server.dispatches, server.rejected = meta["dispatches"], meta["rejected"]
    server.counts = list(meta["counts"])
    gmr = meta["gmr"]
    server.gmr = GMRState(
        tuple(gmr["densities"]),
        gmr["floor"],
        gmr["checks"],
        Plateau(*gmr["server"]),
        tuple(Plateau(*c) for c in gmr["clients"]),
    )
    server.put(tensors["w"].clone(), rankings[meta["ranking"]])
    server.flights = {d: flight(f) for d, f in meta["flights"]}
    server.staged = {a["upload"]["dispatch"]: admitted(a, "staged") for a in meta["staged"]}
    server.buffer = {a["upload"]["client"]: admitted(a, "buffer") for a in meta["buffer"]}
