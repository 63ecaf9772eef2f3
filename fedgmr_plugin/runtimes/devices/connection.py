"""Where a run with devices meets: FedML's keys for the broker and the object store, and the devices' keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.errors import ConfigError

#: Ids have 18 digits at most, as in a topic.
_MOST_ID = 10**18
MQTT, S3 = "customized_training_mqtt_config", "customized_training_s3_config"
_TLS = ("MQTT_TLS_CA", "MQTT_TLS_CERT", "MQTT_TLS_KEY")


class Broker(NamedTuple):
    """An MQTT broker.

    FedML's keys are ``BROKER_HOST``, ``BROKER_PORT``, ``MQTT_USER``, ``MQTT_PWD`` and ``MQTT_KEEPALIVE``
    (seconds); ours, for TLS, are the files ``MQTT_TLS_CA``, ``MQTT_TLS_CERT`` and ``MQTT_TLS_KEY``.
    """

    host: str
    port: int
    user: str | None = None
    password: str | None = None
    keepalive: int = 60
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None


class Bucket(NamedTuple):
    """A bucket of an S3 store.

    FedML's keys are ``CN_S3_ENDPOINT``, ``BUCKET_NAME``, ``CN_S3_AKI``, ``CN_S3_SAK`` and ``CN_REGION_NAME``.
    """

    endpoint: str | None
    name: str
    key_id: str
    secret: str
    region: str | None = None


class Connection(NamedTuple):
    """What a process of the run has to know of the others.

    Attributes:
        run, server: FedML's ``run_id`` and ``server_id``.
        devices: ``client_id_list``, in the order of the clients.
    """

    run: str
    server: int
    devices: tuple[int, ...]


def connection(args: Any) -> Connection:
    """The run that FedML's arguments describe.

    Raises:
        ConfigError: GMR-112.
    """
    run = str(getattr(args, "run_id", "0"))
    where = getattr(args, "yaml_config_file", "") or "args"
    if not re.fullmatch(r"[\w.-]{1,64}", run):
        raise ConfigError("GMR-112", f"run_id={run!r} is no name of letters, digits, _, . and -", where=where)
    server = _whole("server_id", getattr(args, "server_id", None) or 0, range(_MOST_ID), where)
    return Connection(run, server, device_ids(args))


def services(args: Any) -> tuple[Broker, Bucket]:
    """The broker and the store that FedML's arguments name.

    Raises:
        ConfigError: GMR-112.
    """
    where = getattr(args, "yaml_config_file", "") or "args"
    mqtt, s3 = (_section(args, name, where) for name in (MQTT, S3))
    there = f"{where}: {MQTT}"
    _check_tls(mqtt, there)
    broker = Broker(
        _required(mqtt, "BROKER_HOST", MQTT, where),
        _whole("BROKER_PORT", mqtt.get("BROKER_PORT", 1883), range(1, 2**16), there),
        _text(mqtt, "MQTT_USER"),
        _text(mqtt, "MQTT_PWD"),
        _whole("MQTT_KEEPALIVE", mqtt.get("MQTT_KEEPALIVE") or 60, range(1, 2**16), there),
        _text(mqtt, "MQTT_TLS_CA"),
        _text(mqtt, "MQTT_TLS_CERT"),
        _text(mqtt, "MQTT_TLS_KEY"),
    )
    bucket = Bucket(
        _text(s3, "CN_S3_ENDPOINT"),
        _required(s3, "BUCKET_NAME", S3, where),
        _required(s3, "CN_S3_AKI", S3, where),
        _required(s3, "CN_S3_SAK", S3, where),
        _text(s3, "CN_REGION_NAME"),
    )
    if bucket.endpoint is not None and not re.match(r"https?://[^/]", bucket.endpoint):
        problem = f"CN_S3_ENDPOINT={bucket.endpoint!r} does not begin with http:// or https://"
        raise ConfigError("GMR-112", problem, where=f"{where}: {S3}")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", bucket.name):
        raise ConfigError(
            "GMR-112", f"BUCKET_NAME={bucket.name!r} is no name of a bucket", where=f"{where}: {S3}"
        )
    return broker, bucket


def device_ids(args: Any) -> tuple[int, ...]:
    """FedML's ``client_id_list``: a list, or the text of one.

    Raises:
        ConfigError: GMR-112.
    """
    given = getattr(args, "client_id_list", None)
    where = f"{getattr(args, 'yaml_config_file', '') or 'args'}: client_id_list"
    try:
        found = json.loads(given.replace("'", '"')) if isinstance(given, str) else given
        ids = tuple(_whole("id", item, range(_MOST_ID), where) for item in found or ())
    except (TypeError, ValueError, RecursionError, ConfigError) as error:
        raise ConfigError(
            "GMR-112", f"client_id_list={given!r} is no list of whole numbers", where=where
        ) from error
    if not ids or len(set(ids)) < len(ids):
        raise ConfigError("GMR-112", f"client_id_list={given!r} has no id, or one twice", where=where)
    return ids


def device_keys(config: FedGMRConfig, devices: tuple[int, ...], where: str) -> dict[int, bytes] | None:
    """The key of each device; None where devices are not authenticated.

    Raises:
        ConfigError: GMR-111.
    """
    if config.device_authentication == "off":
        return None
    if config.device_keys is None:
        raise ConfigError("GMR-111", "device_keys is not given", where=f"{where}: fedgmr_args.device_keys")
    try:
        found = json.loads(Path(config.device_keys).read_text(encoding="utf-8"))
        keys = {device: bytes.fromhex(found[str(device)]) for device in devices}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"device {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError("GMR-111", f"device_keys={config.device_keys}: {what}", where=where) from error
    _refuse_shared(found, f"device_keys={config.device_keys}", where)
    short = [device for device, key in keys.items() if len(key) < 16]
    if short:
        raise ConfigError("GMR-111", f"the key of device {short[0]} has fewer than 16 bytes", where=where)
    return keys


def _refuse_shared(found: Mapping[str, Any], file: str, where: str) -> None:
    """Refuse a key of two devices, each of which could speak for the other.

    Raises:
        ConfigError: GMR-111.
    """
    owners: dict[str, str] = {}
    for device, key in found.items():
        other = owners.setdefault("".join(str(key).split()).lower(), device)
        if other != device:
            problem = f"{file}: devices {other} and {device} have the same key"
            raise ConfigError("GMR-111", problem, where=where)


def _section(args: Any, name: str, where: str) -> Mapping[str, Any]:
    section = getattr(args, name, None)
    if not isinstance(section, Mapping):
        raise ConfigError("GMR-112", f"{name} is missing", where=where)
    return section


def _check_tls(mqtt: Mapping[str, Any], where: str) -> None:
    """Refuse keys for TLS that would change nothing: passwords might cross the network in clear.

    Raises:
        ConfigError: GMR-112.
    """
    unknown = sorted(key for key in mqtt if str(key).startswith("MQTT_TLS_") and key not in _TLS)
    if unknown:
        raise ConfigError("GMR-112", f"{unknown[0]} is none of {', '.join(_TLS)}", where=where)
    if mqtt.get("MQTT_TLS_KEY") and not mqtt.get("MQTT_TLS_CERT"):
        raise ConfigError("GMR-112", "MQTT_TLS_KEY is the key of no MQTT_TLS_CERT", where=where)


def _required(section: Mapping[str, Any], key: str, name: str, where: str) -> str:
    value = section.get(key)
    if value in (None, ""):
        raise ConfigError("GMR-112", f"{key} is missing", where=f"{where}: {name}")
    return str(value)


def _text(section: Mapping[str, Any], key: str) -> str | None:
    """A value as text, also where YAML makes a number of it (a user ``7``); None where it is empty."""
    value = section.get(key)
    return None if value in (None, "") else str(value)


def _whole(key: str, value: Any, allowed: range, where: str) -> int:
    """A whole number, also where it is quoted."""
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,19}", text) or int(text) not in allowed:
        wanted = f"from {allowed.start} to {allowed.stop - 1}"
        raise ConfigError("GMR-112", f"{key}={value!r} is no whole number {wanted}", where=where)
    return int(text)
