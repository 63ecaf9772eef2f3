"""A private S3 endpoint on the loopback interface: moto's server, with one bucket and checked credentials.

moto keeps objects in memory. It can be paused and resumed with them; a planned `stop` copies them to
disk and `start` puts them back; after a crash they are gone. Its checks of keys, signatures and
policies are switched on once the bucket is made, so that what would be refused elsewhere is refused
here; presigned URLs and public objects are refused too, because moto cannot check them. Its control
pages (`/moto-api`) stay open to whoever reaches the port: a stack for trials, not for secrets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import sys
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes.local import ports
from fedgmr_plugin.runtimes.local.processes import Supervisor
from fedgmr_plugin.runtimes.local.record import write_json

NAME = "storage"
REGION = "us-east-1"  # FedML names no region to an endpoint, and boto3 then signs for this one
#: Seconds until a server that does not answer is given up.
PATIENCE = 30.0
#: Tries to find a port that nobody else takes in the meantime.
TRIES = 5


class Storage:
    """moto under a supervisor, as the process `storage`; it keeps its port and keys once it has them.

    Args:
        bucket: name of the bucket that is made.
        port: TCP port; a free one is chosen where None.

    Raises:
        HostError: GMR-513 without moto's server.
    """

    def __init__(self, supervisor: Supervisor, *, bucket: str = "fedgmr", port: int | None = None) -> None:
        missing = [name for name in ("moto", "flask_cors", "boto3") if importlib.util.find_spec(name) is None]
        if missing:
            raise HostError("GMR-513", f"{', '.join(missing)} not installed")
        self.bucket = bucket
        self._supervisor = supervisor
        self._copies = supervisor.folder / "objects"
        self._chosen = port
        self._seed = secrets.randbits(256)  # moto draws equal keys from equal seeds: restarts change none
        self._users: dict[str, dict[str, Any]] = {}
        self._keys: dict[str, tuple[str, str]] = {}

    @property
    def port(self) -> int:
        """Its TCP port; 0 before the first start where none was given."""
        return self._chosen or 0

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://{ports.HOST}:{self.port}"

    @property
    def keys(self) -> tuple[str, str]:
        """Access key and secret key that may do everything with the bucket and its objects."""
        return self._keys["fedgmr"]

    def start(self) -> None:
        """Start it, make the bucket, put back the objects of a planned stop, and check credentials from now.

        Raises:
            HostError: GMR-513 if it ends or does not answer; the message has the end of its log.
        """
        if self._chosen is not None:
            self._start(self._chosen)
            return
        for attempt in range(TRIES):
            port = ports.free_port()
            try:
                self._start(port)
            except HostError:
                self._chosen = None
                if attempt + 1 == TRIES or ports.is_free(port):
                    raise
            else:
                return

    def stop(self, *, keep_objects: bool = True) -> None:
        """Stop it; clients are refused.

        Args:
            keep_objects: copy the objects to disk, for the next `start`; else they are lost. Object
                versions and access lists are not kept.

        Raises:
            HostError: GMR-513 if objects are to be kept and it does not answer.
        """
        shutil.rmtree(self._copies, ignore_errors=True)
        if keep_objects and NAME in self._supervisor.running():
            self.resume()
            self._guarded("its objects cannot be copied", self._save)
        self._supervisor.stop(NAME)

    def restart(self, *, keep_objects: bool = True) -> None:
        """Stop and start it on the same port, with the same keys.

        Raises:
            HostError: GMR-513 as in `stop` and `start`.
        """
        self.stop(keep_objects=keep_objects)
        self.start()

    def pause(self) -> None:
        """Suspend it: requests wait until they time out; objects stay."""
        self._supervisor.pause(NAME)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._supervisor.resume(NAME)

    def add_user(self, name: str, policy: Mapping[str, Any]) -> tuple[str, str]:
        """Make credentials with a policy of their own, to try what a device may do; they survive restarts.

        Args:
            policy: an AWS policy document.

        Returns:
            access key and secret key.

        Raises:
            HostError: GMR-513 if the server refuses, or has the user.
        """
        if name in self._users:
            raise HostError("GMR-513", f"user={name!r} exists")
        self._checks(on=False)
        self._guarded(f"user={name!r} cannot be made", lambda: self._make_user(name, dict(policy)))
        self._checks(on=True)
        return self._keys[name]

    def client(self, service: str = "s3") -> Any:
        """A boto3 client with the bucket's keys, that neither retries nor waits more than 10 seconds."""
        return self._client(service, *self.keys)

    def _client(self, service: str, key: str, secret: str) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(proxies={}, retries={"max_attempts": 0}, connect_timeout=2, read_timeout=10),
        )

    def _start(self, port: int) -> None:
        log = self._supervisor.log(NAME)
        began = log.stat().st_size if log.exists() else 0
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MOTO_")}
        clean.pop("INITIAL_NO_AUTH_ACTION_COUNT", None)
        command = [sys.executable, "-m", "moto.server", "-H", ports.HOST, "-p", str(port)]
        self._supervisor.start(NAME, command, env=clean)
        self._chosen = port
        if not ports.wait_until(
            lambda: self._ask("/moto-api/data.json") is not None,
            alive=lambda: self._supervisor.poll(NAME) is None,
            patience=PATIENCE,
        ):
            self._supervisor.stop(NAME)
            said = log.read_bytes()[began:].decode("utf-8", "replace").strip().splitlines()[-3:]
            raise HostError(
                "GMR-513", f"moto does not answer on port={port}: {'; '.join(said)}", where=str(log)
            )
        self._guarded("the bucket cannot be made", self._prepare)
        self._checks(on=True)
        self._guarded("the objects cannot be put back", self._restore)

    def _prepare(self) -> None:
        self._post(f"/moto-api/seed?a={self._seed}")
        everything = [f"arn:aws:s3:::{self.bucket}", f"arn:aws:s3:::{self.bucket}/*"]
        statement = {"Effect": "Allow", "Action": "s3:*", "Resource": everything}
        self._users = self._users or {"fedgmr": {"Version": "2012-10-17", "Statement": [statement]}}
        for name, policy in tuple(self._users.items()):
            self._make_user(name, policy)
        s3 = self.client()
        s3.create_bucket(Bucket=self.bucket)
        blocked = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
        s3.put_public_access_block(
            Bucket=self.bucket, PublicAccessBlockConfiguration=dict.fromkeys(blocked, True)
        )

    def _make_user(self, name: str, policy: dict[str, Any]) -> None:
        # Keys are drawn anew from the seed and the name alone, whatever was drawn before.
        self._post(f"/moto-api/seed?a={self._seed ^ int.from_bytes(name.encode(), 'big')}")
        iam = self._client("iam", "setup", "setup")
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="own", PolicyDocument=json.dumps(policy))
        made = iam.create_access_key(UserName=name)["AccessKey"]
        keys = (str(made["AccessKeyId"]), str(made["SecretAccessKey"]))
        if self._keys.setdefault(name, keys) != keys:
            raise HostError("GMR-513", f"user={name!r} has other keys after the restart")
        self._users[name] = policy

    def _checks(self, *, on: bool) -> None:
        """Switch moto's checks of credentials."""
        self._post("/moto-api/reset-auth", b"0" if on else b"inf")

    def _save(self) -> None:
        s3 = self.client()
        index: list[dict[str, Any]] = []
        self._copies.mkdir(mode=0o700)
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket):
            for found in page.get("Contents", ()):
                head = s3.head_object(Bucket=self.bucket, Key=found["Key"])
                s3.download_file(self.bucket, found["Key"], str(self._copies / f"{len(index)}.bin"))
                extra = {"ContentType": head["ContentType"], "Metadata": head["Metadata"]}
                index.append({"key": found["Key"], "extra": extra})
        write_json(self._copies / "index.json", {"objects": index})

    def _restore(self) -> None:
        try:
            index = json.loads((self._copies / "index.json").read_text(encoding="utf-8"))["objects"]
        except FileNotFoundError:
            return
        s3 = self.client()
        for number, entry in enumerate(index):
            copy = str(self._copies / f"{number}.bin")
            s3.upload_file(copy, self.bucket, entry["key"], ExtraArgs=entry["extra"])
        shutil.rmtree(self._copies)

    def _guarded(self, problem: str, act: Callable[[], object]) -> None:
        """Do what talks to the server, and turn its refusals into GMR-513."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            act()
        except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
            where = str(self._supervisor.log(NAME))
            raise HostError("GMR-513", f"{problem}: {error}", where=where) from error

    def _post(self, path: str, body: bytes = b"") -> None:
        if self._ask(path, body) is None:
            raise HostError("GMR-513", f"moto refused {path.partition('?')[0]} on port={self.port}")

    def _ask(self, path: str, body: bytes | None = None) -> bytes | None:
        request = urllib.request.Request(self.endpoint + path, body, {"Content-Type": "text/plain"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=5) as answer:
                return bytes(answer.read())
        except OSError:  # URLError and HTTPError are of this kind
            return None
