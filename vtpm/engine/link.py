"""The daemon's end of the line to the engine host: SOCK_SEQPACKET, with descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import structlog

from vtpm import crashpoints
from vtpm.engine import descriptors, validate_host
from vtpm.engine.host_log import open_log
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError
from vtpm.errors import EngineError
from vtpm.log import SourceLog

log: Final = structlog.get_logger("vtpm.engine")
_lines: Final = SourceLog(log)

_MAX_MESSAGE_SIZE: Final = 256 << 10
_START_TIMEOUT_S: Final = 20.0
_REQUEST_TIMEOUT_S: Final = 20.0
# Replies to one request: an instance each, when a whole engine host is handed over.
_MAX_PARTS: Final = 1 << 17
_HOST_REMEDY: Final = "its instances are FAILED, reset them with their VMs; the next engine host starts by itself"


class HostEvents(Protocol):
    """Who hears from the engine host; called on the event loop."""

    def on_exit(self, exited: pb.WorkerExited, fds: list[int]) -> None:
        """A worker has ended; `fds`, which are the listener's now, are copies of what it left."""

    def on_wake(self, wake: pb.Wake) -> None:
        """Something has come for a parked instance."""

    def on_lost(self) -> None:
        """The engine host is gone."""


@dataclass(slots=True)
class _Asked:
    """A request to the engine host that waits, and the replies to it so far."""

    kind: str
    future: asyncio.Future[list[tuple[pb.HostReply, list[int]]]]
    parts: list[tuple[pb.HostReply, list[int]]] = field(default_factory=list)


class HostLink:
    """Requests to the engine host; `events` is told what nobody asked for.

    What no engine host sends is the end of it: it is killed, with its workers, and `events` hears of that as of any other end.
    """

    def __init__(self, sock: socket.socket, events: HostEvents) -> None:
        sock.setblocking(False)
        self._sock = sock
        # The process that the first message came from, by the kernel's word.
        self._pidfd = -1
        self._events = events
        self._ids = 0
        self._pending: dict[int, _Asked] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._on_readable)

    @classmethod
    async def connect(cls, path: Path, events: HostEvents, *, memory_limit: int, log_path: Path) -> HostLink:
        """Connect to the engine host that runs at `path`, or start one.

        Raises:
            EngineError: ENGINE_HOST_START_FAILED.
        """
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return cls(_connect(path), events)
        _start_host(path, memory_limit, log_path)
        return cls(_connect(path), events)

    def _receive(self) -> tuple[bytes, list[int]]:
        # One byte more than there may be, so that a message that is too long is seen to be.
        data, fds, pid = descriptors.receive_from(self._sock, _MAX_MESSAGE_SIZE + 1)
        if pid and self._pidfd < 0:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(pid)
        return data, fds

    def _on_readable(self) -> None:
        try:
            data, fds = self._receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, fds = b"", []
        if not data:
            descriptors.close_all(fds)
            self.close()
            self._events.on_lost()
            return
        try:
            if len(data) > _MAX_MESSAGE_SIZE:
                raise ViolationError("HOST_SIZE", f"a message of more than {_MAX_MESSAGE_SIZE} bytes")
            reply = validate_host.host_reply(data)
            asked = self._asked(reply)
        except ViolationError as violation:
            descriptors.close_all(fds)
            self._misbehaved(violation)
            return
        if asked is not None:
            self._take_part(asked, reply, fds)
            return
        try:
            if reply.HasField("exited"):
                left, fds = fds, []
                self._events.on_exit(reply.exited, left)
            elif reply.HasField("wake"):
                self._events.on_wake(reply.wake)
        except Exception as error:  # noqa: BLE001  # it is about one instance; what is to come is about others
            _lines.error("events", "engine.event_failed", error=type(error).__name__, message=str(error))
        finally:
            descriptors.close_all(fds)

    def _asked(self, reply: pb.HostReply) -> _Asked | None:
        """Return the request that is answered; None if nobody asked, or waits any more.

        Raises:
            ViolationError: it answers what was not asked.
        """
        if reply.id > self._ids:
            raise ViolationError("HOST_REPLY", "a reply to what was not asked")
        asked = self._pending.get(reply.id)
        more = reply.hello.more or reply.handed_over.more
        if asked is None:
            return None
        kinds = ("hello", "hand_over")
        if more and (asked.kind not in kinds or len(asked.parts) >= _MAX_PARTS):
            raise ViolationError("HOST_PARTS", "a reply that does not end")
        return asked

    def _take_part(self, asked: _Asked, reply: pb.HostReply, fds: list[int]) -> None:
        asked.parts.append((reply, fds))
        if not reply.hello.more and not reply.handed_over.more:
            del self._pending[reply.id]
            if not asked.future.done():
                asked.future.set_result(asked.parts)

    def _misbehaved(self, violation: ViolationError) -> None:
        _lines.error("host", "engine.host_misbehaved", violation=violation.code, message=violation.text, remedy=_HOST_REMEDY)
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.close()
        self._events.on_lost()

    async def request(self, request: pb.HostRequest, fds: Sequence[int] = ()) -> list[tuple[pb.HostReply, list[int]]]:
        """Send one request; return its replies with their descriptors.

        Raises:
            EngineError: the engine host refused, is gone, or does not answer.
        """
        self._ids += 1
        request.id = self._ids
        future: asyncio.Future[list[tuple[pb.HostReply, list[int]]]] = self._loop.create_future()
        asked = self._pending[request.id] = _Asked(request.WhichOneof("body") or "", future)
        try:
            socket.send_fds(self._sock, [request.SerializeToString()], fds)
            replies = await asyncio.wait_for(future, _REQUEST_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            raise EngineError("ENGINE_HOST_UNREACHABLE", f"the engine host does not answer: {type(error).__name__}") from error
        finally:
            if self._pending.pop(request.id, None) is not None:
                # Nobody waits for what has come of it.
                for _, left in asked.parts:
                    descriptors.close_all(left)
        if replies[-1][0].error:
            for _, left in replies:
                descriptors.close_all(left)
            raise EngineError("ENGINE_HOST_REFUSED", f"the engine host refused: {validate_host.plain(replies[-1][0].error)}")
        return replies

    def close(self) -> None:
        """Let go of the engine host; its workers run on."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        for asked in self._pending.values():
            if not asked.future.done():
                asked.future.set_exception(
                    EngineError(
                        "ENGINE_HOST_LOST",
                        "the engine host is gone",
                        remedy="engine-host.log in the runtime directory says why",
                    )
                )
            for _, left in asked.parts:
                descriptors.close_all(left)
        self._pending.clear()


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # With each message comes whose process has sent it (unix(7), SCM_CREDENTIALS).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def _start_host(path: Path, memory_limit: int, log_path: Path) -> None:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # The directory is 0700; the socket's own mode is the second gate.
        previous = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen(4)
        with _log_file(log_path) as log_file:
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vtpm.engine.host",
                    str(listener.fileno()),
                    str(path),
                    str(memory_limit),
                    str(log_path),
                ],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                cwd="/",
                env={
                    key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH")
                }
                | crashpoints.inherited(os.environ),
            )
    except OSError as error:
        raise EngineError("ENGINE_HOST_START_FAILED", f"the engine host can't be started: {error}") from error
    finally:
        listener.close()


def _log_file(path: Path) -> BinaryIO:
    try:
        return os.fdopen(open_log(path), "ab")
    except OSError as error:
        # No VM waits for a log.
        log.warning("engine.host_log_not_writable", path=str(path), error=str(error))
        return Path(os.devnull).open("ab")
