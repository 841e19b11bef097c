"""A worker's permanent state, sealed and made durable by the daemon before anything that it changed is answered.

Invariant 1: `commit` returns after the acknowledgement, or the worker ends without an answer. Invariant 4: sealing is done
here, where the plaintext is; nothing else on the host ever holds it.
"""

from __future__ import annotations

import os
import select
import socket
import time
import uuid
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from vtpm.crashpoints import crash_point
from vtpm.engine.exits import EXIT_COMMIT_REFUSED, EXIT_COMMIT_TIMEOUT, Exit
from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.seal.envelope import Place, StateKind, seal, seal_with, unseal
from vtpm.tpm.codes import TPM_RC_SUCCESS, CommandCode
from vtpm.tpm.command import HEADER

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm.engine.software import Response, SoftwareTpm

# As long as a disk takes to sync.
_SYNC_NS: Final = 250_000
_COMMITS_ASLEEP: Final = 200
# The refusal of a snapshot by a store in trouble; its worker goes on without.
SNAPSHOT_NOT_TAKEN: Final = "SNAPSHOT_NOT_TAKEN"
# How long a power off waits for the store to take the state of an orderly end.
_PARTING_TIMEOUT_S: Final = 10.0
_SHUTDOWN: Final = int(CommandCode.Shutdown)
_NV_WRITE: Final = int(CommandCode.NV_Write)
# Looked for only where the permanent state has changed. Nearly every NV write is another's.
_IDENTITY_COMMANDS: Final = frozenset(
    int(code)
    for code in (
        CommandCode.ChangeEPS,
        CommandCode.ChangePPS,
        CommandCode.Clear,
        CommandCode.HierarchyChangeAuth,
        CommandCode.EvictControl,
    )
)


class DurableState:
    """The line to the commit thread of whatever daemon there is; `await_daemon` waits for the next one, until a deadline."""

    def __init__(self, tpm: SoftwareTpm, commits: socket.socket, await_daemon: Callable[[float], None]) -> None:
        self._tpm = tpm
        self._commits, self._poller = commits, _poller(commits)
        self._await_daemon = await_daemon
        self.instance = uuid.UUID(int=0)
        self.epoch = 0
        self.version = 0
        self._snapshot_version = 0
        self._data_key = b""
        self._cipher: AESGCMSIV | None = None
        self._timeout_s = 60.0
        # Commands that may have ended a key's life and that no daemon has dealt with; who is told of the first of them.
        self.identity_ordinals: set[int] = set()
        self.identity_generation = 0
        self.on_identity: Callable[[], None] = lambda: None
        # Called with each TPM2_NV_Write, which is still in the command's buffer.
        self.on_nv_write: Callable[[], None] = lambda: None
        # Whether the TPM has gone on since TPM2_Startup without a TPM2_Shutdown: a loss of power would count against its guest
        # (dictionary attack logic; Part 1, 19.8). Each TPM2_Startup and TPM2_Shutdown changes NV, and so does the first command
        # that makes a TPM2_Shutdown void. So the commits tell, and other commands cost nothing.
        self.needs_shutdown = False
        # Whether the TPM has what the store does not have, and nobody was told of; the next commit has it too.
        self._ahead = False
        # Whether the last commit shared its sync with nobody, and for how many more the worker waits asleep.
        self._alone = False
        self._asleep = 0

    def seal_first(self, order: pb.Manufacture) -> bytes:
        """Return the envelope of a TPM that was just manufactured, at epoch 0 and version 1."""
        assert self._tpm.permanent is not None
        self.instance = uuid.UUID(bytes=order.instance)
        self._tpm.dirty = False
        return seal(order.data_key, Place(self.instance, StateKind.PERMANENT, 0, 1), self._tpm.permanent)

    def open(self, order: pb.Load) -> bytes:
        """Unseal the state that the order brings; commits go on from there, under the epoch that this worker owns.

        Raises:
            SealedStateError: it is damaged, or another's.
        """
        self.instance = uuid.UUID(bytes=order.place.instance)
        place = Place(self.instance, StateKind.PERMANENT, order.place.epoch, order.place.version)
        permanent = unseal(order.data_key, place, order.sealed)
        self._data_key, self._cipher = order.data_key, None
        self.epoch, self.version = order.epoch, order.place.version
        self._snapshot_version = order.snapshot_version
        self._timeout_s = order.commit_timeout_ms / 1000
        return permanent

    def open_snapshot(self, order: pb.Load) -> bytes:
        """Unseal the snapshot that the order brings.

        Raises:
            SealedStateError: it is damaged, or another's.
        """
        place = Place(self.instance, StateKind.VOLATILE, order.epoch, order.snapshot_version)
        return unseal(self._data_key, place, order.snapshot)

    @property
    def snapshot_version(self) -> int:
        """The version of the snapshot that was taken last, or that this worker goes on from; 0: none."""
        return self._snapshot_version

    @property
    def ready(self) -> bool:
        """Whether there is a state that commits can be made of."""
        return bool(self._data_key)

    def forget_identity(self, generation: int) -> None:
        """A daemon has dealt with what there was at this generation; what came since is told again."""
        if generation == self.identity_generation:
            self.identity_ordinals.clear()
        elif self.identity_ordinals:
            self.on_identity()

    def derive(self, make: Callable[[bytes, uuid.UUID], bytes]) -> bytes:
        """Return what `make` makes of the data key and the instance; the key itself is not given away."""
        return make(self._data_key, self.instance)

    def settle(self, *, reading: bool = False) -> None:
        """Commit if the TPM has changed; a TPM that is just being manufactured has nowhere to commit to.

        `reading`: by commands that only read, so that what changed is the clock, and a TPM2_Shutdown before them still holds.
        """
        if self._tpm.dirty and self._data_key:
            needs_shutdown = self.needs_shutdown
            self.commit()
            if reading:
                self.needs_shutdown = needs_shutdown

    def put_off(self) -> None:
        """The service has shut the TPM down, and told nobody: that goes with the next commit, and nobody waits for it now."""
        self._ahead |= self._tpm.dirty
        self._tpm.dirty = self.needs_shutdown = False

    def catch_up(self) -> None:
        """Commit what `put_off` left too."""
        if (self._tpm.dirty or self._ahead) and self._data_key:
            self.commit()

    def part(self) -> None:
        """Commit what is left before the worker ends, if the store takes it in time; nothing of it was answered."""
        self._timeout_s = min(self._timeout_s, _PARTING_TIMEOUT_S)
        try:
            self.catch_up()
        except Exit:
            # Power goes all the same. The TPM is then as after a loss of power.
            return

    def commit(self, ordinal: int = 0, response: Response | bytes = b"") -> None:
        """Seal the permanent state and have it made durable; `ordinal` and `response` are of the command that changed it."""
        if ordinal in _IDENTITY_COMMANDS and HEADER.unpack_from(response)[2] == TPM_RC_SUCCESS:
            # Before the commit: whoever learns of it asks this thread, which answers when it is durable.
            told = bool(self.identity_ordinals)
            self.identity_ordinals.add(ordinal)
            self.identity_generation += 1
            if not told:
                self.on_identity()
        elif ordinal == _NV_WRITE:
            self.on_nv_write()
        self.needs_shutdown = ordinal != _SHUTDOWN or HEADER.unpack_from(response)[2] != TPM_RC_SUCCESS
        self._ahead = False
        tpm = self._tpm
        assert tpm.permanent is not None
        crash_point("worker.before_seal")
        self.version += 1
        place = Place(self.instance, StateKind.PERMANENT, self.epoch, self.version)
        if self._cipher is None:
            self._cipher = AESGCMSIV(self._data_key)
        sealed = seal_with(self._cipher, place, tpm.permanent)
        tpm.dirty = False
        crash_point("worker.before_commit")
        self._made_durable(pb.Commit(epoch=self.epoch, version=self.version, sealed=sealed))
        crash_point("worker.after_commit")

    def take_snapshot(self, plain: bytes, *, attached: bool) -> bool:
        """Seal a snapshot and have it made durable; False if the store can't take it now.

        From its acknowledgement on this worker must run no command.
        """
        version = self._snapshot_version + 1
        place = Place(self.instance, StateKind.VOLATILE, self.epoch, version)
        commit = pb.Commit(epoch=self.epoch, version=version, kind=pb.Commit.SNAPSHOT, attached=attached)
        commit.sealed = seal(self._data_key, place, plain)
        if self._made_durable(commit):
            self._snapshot_version = version
            return True
        return False

    def finish_consume(self, token: bytes) -> None:
        """Return when the snapshot is durably forgotten, which the daemon sees to; before that no command may run.

        If that daemon is gone the next one is asked. Under the same 16 bytes it succeeds, under others never (invariant 2).
        """
        deadline = time.monotonic() + self._timeout_s
        # The answer is on its way, and a guest waits for it.
        self._alone = True
        message = b""
        while self._try_commit(message, self._snapshot_version, deadline) is None:
            self._await_daemon(deadline)
            commit = pb.Commit(epoch=self.epoch, version=self._snapshot_version, kind=pb.Commit.CONSUME, token=token)
            message = frame(commit.SerializeToString())

    def _made_durable(self, commit: pb.Commit) -> bool:
        """Wait until `commit` is durable; False if it is a snapshot that the store does not take."""
        message = frame(commit.SerializeToString())
        deadline = time.monotonic() + self._timeout_s
        while (durable := self._try_commit(message, commit.version, deadline)) is None:
            # The daemon is gone. The next one brings new sockets and takes the same commit again.
            self._await_daemon(deadline)
        return durable

    def use(self, commits: socket.socket) -> None:
        """Go on with another daemon's socket."""
        self._commits.close()
        self._commits, self._poller = commits, _poller(commits)

    def _try_commit(self, message: bytes, version: int, deadline: float) -> bool | None:
        """Send and wait for the answer: True for durable, False for a snapshot that was not taken, None without a daemon."""
        reader = FrameReader()
        commits = self._commits
        try:
            commits.sendall(message)
            while True:
                data = self._receive_soon()
                if data is None:
                    await_readable(commits, deadline, self._poller)
                    data = commits.recv(4096)
                if not data:
                    return None
                for reply in reader.feed(data):
                    ack = pb.CommitAck.FromString(reply)
                    if ack.refused == SNAPSHOT_NOT_TAKEN:
                        return False
                    if ack.refused:
                        # Somebody else owns this instance now (invariant 3), or the store is not what we left.
                        raise Exit(EXIT_COMMIT_REFUSED)
                    if ack.version == version:
                        self._alone = ack.batch_size == 1
                        return True
        except OSError:
            return None

    def _receive_soon(self) -> bytes | None:
        """Ask again and again for as long as a disk takes to sync; None if nothing came.

        A guest waits for exactly this answer, and to wake a core that has gone to sleep takes a good part of such a time. With
        others committing too, or others that want the core, it is better left to them: then the answer does not come so soon,
        and for a while nobody waits awake.
        """
        if not self._alone or self._asleep:
            self._asleep = max(0, self._asleep - 1)
            return None
        end = time.perf_counter_ns() + _SYNC_NS
        while time.perf_counter_ns() < end:
            try:
                return self._commits.recv(4096, socket.MSG_DONTWAIT)
            except BlockingIOError:
                # Whoever else wants this core comes first, the commit thread among them.
                os.sched_yield()
        self._asleep = _COMMITS_ASLEEP
        return None


def await_readable(sock: socket.socket, deadline: float, poller: select.poll | None = None) -> None:
    """Wait for `sock` until `deadline` (time.monotonic); then the worker ends. `poller` has it, and nothing else."""
    if poller is None:
        poller = _poller(sock)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise Exit(EXIT_COMMIT_TIMEOUT)


def _poller(sock: socket.socket) -> select.poll:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return poller
