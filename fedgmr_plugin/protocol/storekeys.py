"""Names of a run's objects in the store.

All begin with ``fedml_{run}``, as FedML's own do: one policy and one lifecycle rule, for ``fedml_*``, cover
them (``docs/self-hosting.md``). What a device may read and write begins alike too::

    fedml_{run}/sent/{token}/...                    increments and masks, for every device
    fedml_{run}/answers/{device}/{token}-{dispatch} a device's update
    fedml_{run}/probes/{device}/...                 by which a device measures its bandwidth
    fedml_{run}_sent_{token}_...                    files for FedML's own devices
    fedml_{run}_{device}_...                        what these answer,
    fedml_{run}_{server}_{device}-...               or, with the Android SDK, this

FedML's own devices take a key for the name of a file, so theirs have no slash.

Probes and answers of FedML's own devices name no token. Those of two runs of one ``run_id`` are told apart by
time: a server sweeps while others still hear that it is there (`fedgmr_plugin.protocol.presence`), so what it
finds is of its own run or of an earlier one, unless the other server is at another broker, or has other keys,
with the same bucket, or its devices have started before it: such a device does without a measured bandwidth.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Container


def sent_key(run: str, token: str, name: str) -> str:
    """An object for mask-aware devices."""
    return f"fedml_{run}/sent/{token}/{name}"


def answer_key(run: str, token: str, dispatch: int, device: int) -> str:
    """A device's update: nobody names another place to the server."""
    return f"fedml_{run}/answers/{device}/{token}-{dispatch}"


def probe_key(run: str, device: int) -> str:
    """A new object for a measurement."""
    return f"fedml_{run}/probes/{device}/{uuid.uuid4().hex}"


def file_key(run: str, token: str, name: str) -> str:
    """A file for FedML's own devices."""
    return f"fedml_{run}_sent_{token}_{name}"


def run_prefixes(run: str) -> tuple[str, ...]:
    """Beginnings of all names of a run; a name with one of them may be another run's."""
    return f"fedml_{run}/", f"fedml_{run}_"


def is_sent(key: str, run: str, token: str) -> bool:
    """Whether the server of this run stored `key`."""
    return key.startswith((sent_key(run, token, ""), file_key(run, token, "")))


def is_of_run(key: str, run: str, token: str, devices: Container[int], server: int = 0) -> bool:
    """Whether `key` is of this run, and of no other with its ``run_id`` as far as names tell."""
    answer = re.fullmatch(rf"fedml_{re.escape(run)}/answers/\d+/(.+)-\d+", key)
    is_answer = answer is not None and answer[1] == token
    probe = re.fullmatch(rf"fedml_{re.escape(run)}/probes/(\d{{1,18}})/[0-9a-f]+", key)
    is_probe = probe is not None and int(probe[1]) in devices
    return is_sent(key, run, token) or is_answer or is_probe or is_file_answer(key, run, devices, server)


def is_file_answer(key: str, run: str, devices: Container[int], server: int = 0) -> bool:
    """Whether one of FedML's own devices among `devices` may have written `key` in this run."""
    found = re.fullmatch(rf"fedml_{re.escape(run)}_{server}_(\d{{1,18}})-[0-9a-f]{{32}}", key)
    if found is None:
        found = re.fullmatch(rf"fedml_{re.escape(run)}_(\d{{1,18}})_[0-9A-Za-z.-]{{1,128}}", key)
    return found is not None and int(found[1]) in devices
