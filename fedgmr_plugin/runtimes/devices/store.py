"""The object store: any S3, with private objects of bounded size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from fedgmr_plugin.errors import HostError, WireError
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.runtimes.devices.connection import Bucket
from fedgmr_plugin.runtimes.devices.loopback import announced
from fedgmr_plugin.runtimes.devices.office import Content

_log = logging.getLogger(__name__)
_REFUSED = frozenset({"AccessDenied", "NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch"})
_MISSING = frozenset({"NoSuchKey", "404", "NotFound"})
#: Why nobody can read an object, whose owner stored it so: archived, or encrypted with a key of its own.
_UNREADABLE = frozenset({"AccessDenied", "InvalidObjectState", "InvalidRequest", "InvalidArgument"})


class Unreachable(Exception):
    """The store cannot be reached now; it may be later."""


class S3Store:
    """Objects in one bucket. Safe for concurrent threads."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket, self._told = bucket.name, False
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=bucket.endpoint,
            region_name=bucket.region or "us-east-1",
            aws_access_key_id=bucket.key_id,
            aws_secret_access_key=bucket.secret,
            config=Config(
                signature_version="s3v4",
                connect_timeout=5,
                read_timeout=30,
                retries={"max_attempts": 1, "mode": "standard"},
                max_pool_connections=16,
            ),
        )

    def put(self, piece: Piece, content: Content) -> None:
        """Store an object, for nobody but who has the bucket's keys.

        Raises:
            Unreachable: try again later.
            HostError: GMR-515 if the store refuses.
        """
        body = content if isinstance(content, (bytes, bytearray)) else bytes(content)
        self._call("put_object", Key=piece.key, Body=body)

    def get(self, piece: Piece) -> bytearray:
        """An object, if it is exactly the one that was announced.

        Raises:
            WireError: GMR-746 if it is missing or another one; no more than its announced length is read.
            Unreachable, HostError: as `put`.
        """
        found = self._call("get_object", Key=piece.key)
        if found is None:
            raise WireError("GMR-746", f"key={piece.key} is not in the store, or not to be read")
        with found["Body"] as body:
            length = found["ContentLength"]
            if length > piece.size or (piece.sha256 and length != piece.size):
                raise WireError("GMR-746", f"key={piece.key} has {length} bytes instead of {piece.size}")
            content = bytearray(length)
            view, filled = memoryview(content), 0
            try:
                while filled < length:
                    part = body.read(min(2**20, length - filled))
                    if not part:
                        break
                    view[filled : filled + len(part)] = part
                    filled += len(part)
            except (BotoCoreError, OSError) as error:
                raise Unreachable(str(error)) from error
        if filled < length:
            raise Unreachable(f"key={piece.key} ended after {filled} of {length} bytes")
        problem = announced(piece, content)
        if problem is not None:
            raise problem
        return content

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; missing ones are no error, and those that may not be removed are told of, once.

        Some stores let nobody remove several objects at once who has no right to the bucket itself: what is
        refused so is removed one by one.

        Raises:
            Unreachable: as `put`.
        """
        for start in range(0, len(keys), 1000):
            for key in self._delete_at_once(keys[start : start + 1000]):
                try:
                    self._call("delete_object", Key=key)
                except HostError as error:
                    if not self._told:
                        self._told = True
                        _log.warning("key=%s stays in the store: %s", key, error)

    def _delete_at_once(self, keys: Sequence[str]) -> Sequence[str]:
        """Remove objects; those that the store refuses to remove so."""
        objects = [{"Key": key} for key in keys]
        try:
            answer = self._call("delete_objects", Delete={"Objects": objects, "Quiet": True}) or {}
        except HostError:
            return keys
        left = [(str(e.get("Code")), str(e.get("Key"))) for e in answer.get("Errors", ())]
        if any(code not in _REFUSED | _MISSING for code, _ in left):
            raise Unreachable(f"delete_objects: {left}")
        return [key for code, key in left if code in _REFUSED]

    def keys(self, prefix: str) -> list[str]:
        """Names of the objects that begin with `prefix`.

        Raises:
            Unreachable, HostError: as `put`.
        """
        found: list[str] = []
        more: dict[str, str] = {}
        while True:
            answer = self._call("list_objects_v2", Prefix=prefix, **more) or {}
            found += [item["Key"] for item in answer.get("Contents", ())]
            if not answer.get("IsTruncated"):
                return found
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def volatile(self) -> list[tuple[Piece, Content]]:
        """Objects that are lost with this process: none."""
        return []

    def _call(self, operation: str, **named: Any) -> Any:
        """The store's answer; None where an object is missing."""
        try:
            return getattr(self._client, operation)(Bucket=self._bucket, **named)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code"))
            # S3 tells nobody who may not list a bucket, as no device may, that an object of it is missing.
            if code in _MISSING or (operation == "get_object" and _is_unreadable(code)):
                return None
            if code in _REFUSED:
                raise HostError("GMR-515", f"the store refuses {operation}: {error}") from error
            raise Unreachable(str(error)) from error
        except (BotoCoreError, OSError) as error:
            raise Unreachable(str(error)) from error


def _is_unreadable(code: str) -> bool:
    """Whether a read fails however often it is tried: who waits for one such object must hear of it."""
    return code in _UNREADABLE or code.startswith("KMS.")
