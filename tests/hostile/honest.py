"""An instance whose VM must notice nothing: one connection, and each increment that was acknowledged is there."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import tpm_pb2

_PCR = 16
_TIMEOUT_S = 60.0
_PAUSE_S = 0.001


class Honest(threading.Thread):
    """`failure` is what it noticed; `acknowledged` how many increments it has an answer to."""

    def __init__(self, daemon: DaemonProcess, name: str, ended: threading.Event) -> None:
        super().__init__(name=name)
        self._daemon = daemon
        self._ended = ended
        instance = daemon.running(name)
        self.id = instance.id
        self._sock = raw.connect(Path(instance.tpm_socket))
        self._sock.settimeout(_TIMEOUT_S)
        raw.succeed(self._sock, raw.nv_define(raw.COUNTER, counter=True))
        raw.succeed(self._sock, raw.nv_increment())
        self._first = raw.counter_of(self._sock)
        self._pcr = bytes(32)
        self.acknowledged = 0
        self.slowest_s = 0.0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Until the end."""
        try:
            while not self._ended.is_set():
                self._turn()
                time.sleep(_PAUSE_S)
        except BaseException as error:  # noqa: BLE001  # told to whoever joins this thread
            self.failure = error

    def _turn(self) -> None:
        start = time.monotonic()
        raw.succeed(self._sock, raw.nv_increment())
        self.slowest_s = max(self.slowest_s, time.monotonic() - start)
        self.acknowledged += 1
        if self.acknowledged % 50 == 0:
            digest = hashlib.sha256(str(self.acknowledged).encode()).digest()
            raw.succeed(self._sock, raw.pcr_extend(_PCR, digest))
            self._pcr = hashlib.sha256(self._pcr + digest).digest()
            assert raw.succeed(self._sock, raw.pcr_read(_PCR))[-32:] == self._pcr, "the PCR is another"
            assert raw.counter_of(self._sock) == self._first + self.acknowledged, "an increment was lost"

    def look_at_the_end(self) -> None:
        """On the same connection: everything that was acknowledged is there, and the operator gets an answer too."""
        assert self.failure is None, f"{self.name} noticed: {self.failure!r}"
        assert self.acknowledged
        assert raw.counter_of(self._sock) == self._first + self.acknowledged, "an increment was lost"
        selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[_PCR])
        request = tpm_pb2.QuoteRequest(instance=self.name, selections=[selection], nonce=b"hostile")
        quoted = self._daemon.client.call(self._daemon.client.tpm.Quote, request)
        assert quoted.values[0].digest == self._pcr
        self._sock.close()
