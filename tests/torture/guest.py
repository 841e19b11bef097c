"""One VM with its operator, in a thread: does things at random, survives every loss, and believes nothing but its model."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import raw
from tests.torture.model import Model, ViolationError
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.cli.client import Client
from vtpm.errors import ErrorKind, VtpmError
from vtpm.tpm.command import HEADER_SIZE

_PCR = 4
_SELECTION = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[_PCR])
# Longer than the daemon lets a commit wait.
_TIMEOUT_S = 90.0
_REASONS = frozenset(("WORKER_LOST", "ENGINE_HOST_LOST", "SNAPSHOT_MISSING"))
# What a call may fail with while things die around it.
_TRANSIENT = frozenset((ErrorKind.UNAVAILABLE, ErrorKind.ABORTED, ErrorKind.INTERNAL, ErrorKind.DEADLINE_EXCEEDED))


class LostError(Exception):
    """The connection to the TPM is gone."""


class Guest(threading.Thread):
    """`ended` stops it; `failure` is what it found wrong."""

    def __init__(self, address: str, name: str, seed: int, ended: threading.Event) -> None:
        super().__init__(name=name)
        self._address = address
        self._random = random.Random(f"{seed} {name}")
        self._ended = ended
        self._client = Client(address)
        self._sock: socket.socket | None = None
        self.model = Model(name)
        self.counts: Counter[str] = Counter()
        # Between two actions.
        self.pause_s = 0.0
        self.failure: BaseException | None = None
        self._actions: list[tuple[int, Callable[[], None]]] = [
            (50, self._increment),
            (30, self._extend),
            (30, self._check),
            (5, self._quote),
            (2, self._power_cycle),
            (1, self._replace),
        ]
        # A TPM that is hibernated loses nothing: the model does not change, and the next command goes on.
        if hasattr(pb, "HibernateInstanceRequest"):
            self._actions.append((3, self._hibernate))

    def run(self) -> None:
        """Until the end, or the first violation."""
        try:
            self._create()
            self._settle()
            weights = [weight for weight, _ in self._actions]
            while not self._ended.is_set():
                ((_, action),) = self._random.choices(self._actions, weights)
                try:
                    action()
                except LostError:
                    self._settle()
                self._ended.wait(self.pause_s)
        except BaseException as error:  # noqa: BLE001  # told to whoever joins this thread
            self.failure = error
            self._ended.set()

    def look_at_the_end(self) -> None:
        """When all is quiet: what was acknowledged is there, now and after a power cycle."""
        try:
            self._settle()
            with contextlib.suppress(LostError):
                self._power_cycle()
            self._settle()
        except BaseException as error:  # noqa: BLE001
            self.failure = error
        self._disconnect()
        self._client.close()

    # ---- the VM ----------------------------------------------------------------------------------------------------------

    def _ask(self, command: bytes) -> bytes:
        assert self._sock is not None
        try:
            response = raw.ask(self._sock, command)
        except TimeoutError:
            raise ViolationError(f"{self.name}: no answer within {_TIMEOUT_S:g} s") from None
        except OSError:
            response = b""
        if len(response) < HEADER_SIZE:
            self.counts["lost connections"] += 1
            raise LostError
        if rc := raw.rc_of(response):
            raise ViolationError(f"{self.name}: a command that must succeed was answered with 0x{rc:x}")
        return response

    def _increment(self) -> None:
        self.model.begin_increment()
        self._ask(raw.nv_increment())
        self.model.end_increment()

    def _extend(self) -> None:
        digest = self._random.randbytes(32)
        before = set(self.model.pcrs)
        self.model.begin_extend(digest)
        self._ask(raw.pcr_extend(_PCR, digest))
        self.model.end_extend(digest, before)

    def _check(self) -> None:
        self.model.saw_pcr(self._ask(raw.pcr_read(_PCR))[-32:])
        self.model.saw_counter(int.from_bytes(raw.nv_value(self._ask(raw.nv_read())), "big"))

    # ---- its operator ----------------------------------------------------------------------------------------------------

    def _call(self, service: str, method: str, request: Any) -> Any:
        try:
            return self._client.call(getattr(getattr(self._client, service), method), request)
        except VtpmError as error:
            if error.kind in _TRANSIENT:
                # A channel that has lost its server is slow to look for the next one.
                self._client.close()
                self._client = Client(self._address)
            raise

    def _call_until_known(self, method: str, request: Any) -> Any:
        """Call a method that may be called again, until a daemon answers."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                return self._call("instances", method, request)
            except VtpmError as error:
                if error.kind not in _TRANSIENT:
                    raise
                if time.monotonic() > deadline:
                    raise ViolationError(f"{self.name}: {method}: {error.reason}: {error}") from None
                self.counts["calls repeated"] += 1
                time.sleep(0.05)

    def _get(self) -> pb.Instance:
        found: pb.Instance = self._call_until_known("GetInstance", pb.GetInstanceRequest(instance=self.name))
        return found

    def _create(self) -> None:
        profile = pb.Profile(ek_algorithms=[pb.ECC_P256])
        # The same id in each attempt: one instance, however often it is asked for.
        request = pb.CreateInstanceRequest(
            name=self.name, profile=profile, request_id=str(uuid.UUID(bytes=os.urandom(16), version=4))
        )
        self._call_until_known("CreateInstance", request)
        self.counts["created"] += 1
        acknowledged = self.model.acknowledged
        self.model = Model(self.name, acknowledged=acknowledged)
        self._start()
        while True:
            try:
                self._connect()
                with contextlib.suppress(ViolationError):
                    # Defined already, if only the answer was lost.
                    self._ask(raw.nv_define(raw.COUNTER, counter=True))
                self._ask(raw.nv_increment())
                value = int.from_bytes(raw.nv_value(self._ask(raw.nv_read())), "big")
            except LostError:
                self._settle(counter=False)
                continue
            self.model.least = self.model.most = value
            return

    def _start(self) -> None:
        request = pb.StartInstanceRequest(instance=self.name, startup=pb.STARTUP_CLEAR)
        while True:
            try:
                self.model.powered_on(self._call_until_known("StartInstance", request).epoch)
                return
            except VtpmError as error:
                if error.reason != "INSTANCE_FAILED":
                    raise
            # It had begun, and its worker was lost on the way.
            if (instance := self._get()).state == pb.FAILED:
                self._reset(instance)

    def _power_cycle(self) -> None:
        self._disconnect()
        self._call_until_known("StopInstance", pb.StopInstanceRequest(instance=self.name))
        self.counts["power cycles"] += 1
        self._start()
        raise LostError

    def _replace(self) -> None:
        self._disconnect()
        self._call_until_known("StopInstance", pb.StopInstanceRequest(instance=self.name))
        self._call_until_known("DeleteInstance", pb.DeleteInstanceRequest(instance=self.name, allow_missing=True))
        self.counts["deleted"] += 1
        self._create()
        raise LostError

    def _quote(self) -> None:
        request = tpm_pb2.QuoteRequest(instance=self.name, selections=[_SELECTION], nonce=b"torture")
        try:
            quoted = self._call("tpm", "Quote", request)
        except VtpmError as error:
            if error.kind not in _TRANSIENT and error.reason != "INSTANCE_NOT_ON":
                raise
            self.counts["calls repeated"] += 1
            return
        self.model.saw_pcr(quoted.values[0].digest)
        self.counts["quotes"] += 1

    def _hibernate(self) -> None:
        request = getattr(pb, "HibernateInstanceRequest")(instance=self.name)  # noqa: B009
        try:
            self._call("instances", "HibernateInstance", request)
        except VtpmError as error:
            if error.kind not in (*_TRANSIENT, ErrorKind.FAILED_PRECONDITION, ErrorKind.RESOURCE_EXHAUSTED):
                raise
            return
        self.counts["hibernated"] += 1

    # ---- after a loss ----------------------------------------------------------------------------------------------------

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _connect(self) -> None:
        self._disconnect()
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            instance = self._get()
            if instance.state != pb.ON:
                raise LostError
            try:
                self._sock = raw.connect(Path(instance.tpm_socket))
                self._sock.settimeout(_TIMEOUT_S)
                return
            except OSError:
                # Its worker is gone and the daemon does not know yet, or the other way round.
                if time.monotonic() > deadline:
                    raise ViolationError(f"{self.name}: ON, and nobody serves {instance.tpm_socket}") from None
                time.sleep(0.02)

    def _settle(self, *, counter: bool = True) -> None:
        """Find out what the instance is now, bring it back as an operator would, and check it."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            if time.monotonic() > deadline:
                raise ViolationError(f"{self.name}: does not come back")
            instance = self._get()
            match instance.state:
                case pb.ON:
                    self.model.still_on(instance.epoch)
                    try:
                        self._connect()
                        if counter:
                            self._check()
                    except LostError:
                        time.sleep(0.02)
                        continue
                    return
                case pb.FAILED:
                    self._reset(instance)
                case _:
                    # Nobody but us powers it off, and we bring it back at once.
                    self.counts["found off"] += 1
                    self._start()

    def _reset(self, instance: pb.Instance) -> None:
        if instance.failure.reason not in _REASONS or not instance.failure.remedy:
            raise ViolationError(f"{self.name}: FAILED with {instance.failure}")
        self.counts[f"failed: {instance.failure.reason}"] += 1
        with contextlib.suppress(VtpmError):
            request = pb.ResetInstanceRequest(instance=self.name, startup=pb.STARTUP_CLEAR)
            self._call("instances", "ResetInstance", request)
        # Whether that has happened, the state says: from FAILED only a reset of ours leads to ON.
        now = self._get()
        if now.state == pb.ON:
            self.model.powered_on(now.epoch)
