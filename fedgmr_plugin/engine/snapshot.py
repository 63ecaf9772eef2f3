"""A server's state, and a simulation's, as JSON-able data and tensors.

The pair (meta, tensors) holds everything that changes: a server made with the same configuration, plan and
layout continues from it, at any event, to the same bits; so does a simulation between two windows. Tensors
may be written with safetensors; meta with `json`. A run with real clients (`Live`) continues at any event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fedgmr_plugin.engine.admission import Admitted, InFlight
from fedgmr_plugin.engine.events import Dispatch, UploadArrived
from fedgmr_plugin.engine.live import Live
from fedgmr_plugin.engine.server import Server
from fedgmr_plugin.engine.simulate import Simulation
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
        upload = {k: v for k, v in vars(a.upload).items() if k not in ("values_S", "sent_S")}
        tensors[f"{group}.{a.upload.dispatch}"] = a.upload.values_S.clone()
        if a.upload.sent_S is not None:
            tensors[f"{group}.{a.upload.dispatch}.sent"] = a.upload.sent_S.clone()
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
        "samples": list(server.samples),
        "away": sorted(server.away),
        "overdue": sorted(server.overdue),
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
    """Put `server` into `state`; tensors go to the device of the server's vector."""
    meta, device = state.meta, server.ranked_D.device
    tensors = {name: tensor.to(device) for name, tensor in state.tensors.items()}
    rankings = {
        digest: Ranking(tuple(densities), tensors[f"ranking.{digest}"].clone())
        for digest, densities in meta["rankings"].items()
    }

    def flight(f: dict[str, Any]) -> InFlight:
        return InFlight(f["client"], f["version"], f["density"], rankings[f["ranking"]], f["rung"])

    def admitted(a: dict[str, Any], group: str) -> Admitted:
        name = f"{group}.{a['upload']['dispatch']}"
        sent_S = tensors.get(f"{name}.sent")
        upload = UploadArrived(values_S=tensors[name].clone(), sent_S=sent_S, **a["upload"])
        return Admitted(flight(a["flight"]), upload)

    if "interval_start" in tensors:
        server.interval_start_D = tensors["interval_start"].clone()
    server.version, server.time = meta["version"], meta["time"]
    server.phase, server.candidate = meta["phase"], meta["candidate"]
    server.dispatches, server.rejected = meta["dispatches"], meta["rejected"]
    server.counts, server.samples = list(meta["counts"]), list(meta["samples"])
    server.away, server.overdue = set(meta["away"]), set(meta["overdue"])
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


def snapshot_simulation(simulation: Simulation) -> Snapshot:
    """The state of a simulation between two windows; tensors of the server are copies."""
    meta, tensors = snapshot(simulation.server)
    pending = []
    names: dict[int, str] = {}
    for d in simulation.pending.values():
        payload = names.setdefault(id(d.values_S), f"payload.{len(names)}")  # clients of one rung share it
        tensors[payload] = d.values_S
        kept = {k: v for k, v in vars(d).items() if k not in ("ranking", "values_S")}
        pending.append({**kept, "payload": payload})
    if simulation.uplink is not None:
        owed = simulation.uplink.residual
        tensors.update({f"residual.{n}": owed_D.clone() for n, owed_D in owed.items()})  # thin() writes there
    if simulation.downlink is not None:
        held = simulation.downlink.held
        tensors.update({f"held.{n}": held_D.clone() for n, held_D in held.items()})  # cut() writes there
    starts = simulation.probed_starts
    tensors.update({f"start.{version}": w_D for version, w_D in starts.items()})
    return Snapshot(
        {
            "server": meta,
            "network": simulation.network.state(),
            "pending": pending,
            "starts": list(starts),
            "traffic": simulation.traffic,
        },
        tensors,
    )


def restore_simulation(simulation: Simulation, state: Snapshot) -> None:
    """Put a `simulation` that has not started into `state`."""
    meta, device = state.meta, simulation.server.ranked_D.device
    tensors = {name: tensor.to(device) for name, tensor in state.tensors.items()}
    restore(simulation.server, Snapshot(meta["server"], tensors))
    simulation.network.load_state(meta["network"])
    flights = simulation.server.flights
    pending = []
    for kept in meta["pending"]:
        fields = {k: v for k, v in kept.items() if k != "payload"}
        ranking = flights[fields["dispatch"]].ranking
        pending.append(Dispatch(ranking=ranking, values_S=tensors[kept["payload"]], **fields))
    simulation.wait_for(pending)
    if simulation.uplink is not None:
        simulation.uplink.residual = _by_client(tensors, "residual")
    if simulation.downlink is not None:
        simulation.downlink.held = _by_client(tensors, "held")
    simulation.probed_starts = {version: tensors[f"start.{version}"] for version in meta["starts"]}
    simulation.traffic = meta["traffic"]


def _by_client(tensors: Mapping[str, Tensor], name: str) -> dict[int, Tensor]:
    """The clients' own copies of the tensors ``name.N``."""
    start = f"{name}."
    return {int(k.removeprefix(start)): t.clone() for k, t in tensors.items() if k.startswith(start)}


def snapshot_live(live: Live) -> Snapshot:
    """The state of a run with real clients; tensors are copies."""
    meta, tensors = snapshot(live.server)
    return Snapshot({"server": meta, "live": live.state()}, tensors)


def restore_live(live: Live, state: Snapshot) -> None:
    """Put a `live` run that has not started into `state`."""
    restore(live.server, Snapshot(state.meta["server"], state.tensors))
    live.load_state(state.meta["live"])
