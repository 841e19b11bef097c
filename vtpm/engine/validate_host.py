"""What goes between a worker and the engine host, and from the engine host to the daemon, is checked here, where it is read."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError

from vtpm.engine.descriptors import MOST_DESCRIPTORS
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import INTEGER_END, ViolationError

_NAME: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(/[a-z0-9-]{1,32})?")
_MAX_TEXT: Final = 300
_MAX_PID: Final = 1 << 22
_MAX_ENGINES: Final = 16
_LISTENERS: Final = (pb.DATA_LISTENER, pb.CONTROL_LISTENER)
_PARKED: Final = (*_LISTENERS, pb.DATA, pb.VM_DATA, pb.CONTROL, pb.VM_CONTROL)
_ONCE: Final = (*_LISTENERS, pb.VM_DATA, pb.VM_CONTROL)
# The longest request of the control channel, which zeros may pad.
_MAX_ZEROS: Final = 1 << 16


def _demand(holds: object, code: str, text: str) -> None:
    if not holds:
        raise ViolationError(code, text)


# ---- a worker's last words ---------------------------------------------------------------------------------------------------


def park(message: bytes, fds: Sequence[int]) -> pb.Park:
    """Return what a worker leaves that hibernates; `fds` stay the caller's.

    Raises:
        ViolationError: that is nothing that another worker could go on with.
    """
    try:
        found = pb.Park.FromString(message)
    except DecodeError:
        raise ViolationError("PARK_MALFORMED", f"{len(message)} bytes on the engine host's line are no message") from None
    _check_roles(found.roles, found.zeros)
    _demand(found.roles, "PARK_EMPTY", "nothing was left")
    _demand(len(found.roles) == len(fds), "PARK_DESCRIPTORS", f"{len(fds)} descriptors for {len(found.roles)} roles")
    _demand(found.snapshot_version < INTEGER_END, "PARK_VERSION", "a snapshot's version that can't be")
    for role, fd in zip(found.roles, fds, strict=True):
        _demand(_is_socket(fd, listening=role in _LISTENERS), "PARK_KIND", "a descriptor that is not what its role says")
    return found


def _check_roles(roles: Sequence[int], zeros: Sequence[int]) -> None:
    _demand(len(roles) <= MOST_DESCRIPTORS, "PARK_COUNT", f"{len(roles)} roles")
    _demand(all(role in _PARKED for role in roles), "PARK_ROLE", "a role that there is not")
    _demand(all(list(roles).count(role) <= 1 for role in _ONCE), "PARK_ROLE", "a role twice that is there once")
    _demand(len(zeros) in (0, len(roles)) and all(zero < _MAX_ZEROS for zero in zeros), "PARK_ZEROS", "zeros for no role")


def _is_socket(fd: int, *, listening: bool) -> bool:
    try:
        with socket.socket(fileno=fd) as found:
            try:
                stream = found.type == socket.SOCK_STREAM
                return stream and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) == listening
            finally:
                # It stays the caller's.
                found.detach()
    except OSError:
        return False


# ---- the engine host to the daemon -------------------------------------------------------------------------------------------


def host_reply(message: bytes) -> pb.HostReply:
    """Return what the engine host says.

    Raises:
        ViolationError: no engine host says that.
    """
    try:
        reply = pb.HostReply.FromString(message)
    except DecodeError:
        raise ViolationError("HOST_MALFORMED", f"{len(message)} bytes of the engine host are no message") from None
    if reply.HasField("wake"):
        _check_wake(reply.wake)
    if reply.HasField("exited"):
        _check_exited(reply.exited)
    if reply.HasField("hello"):
        _check_hello(reply.hello)
    for parked in (*reply.handed_over.parked, *reply.copied.parked):
        _check_parked(parked)
    _demand(0 <= reply.pid < _MAX_PID, "HOST_PID", "a process id that can't be")
    return reply


def plain(text: str) -> str:
    """Return the text of an engine host's error as one may print it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_TEXT])


def _check_name(instance: str, epoch: int, *, helper: bool) -> None:
    match = _NAME.fullmatch(instance)
    _demand(match is not None and (helper or match[1] is None), "HOST_INSTANCE", "an instance's name that is none")
    _demand(epoch < INTEGER_END, "HOST_EPOCH", "an epoch that can't be")


def _check_wake(wake: pb.Wake) -> None:
    _check_name(wake.instance, wake.epoch, helper=False)
    _demand(0 <= wake.pid < _MAX_PID, "HOST_PID", "a process id that can't be")


def _check_parked(parked: pb.ParkedInstance) -> None:
    _check_name(parked.instance, parked.epoch, helper=False)
    _check_roles(parked.roles, parked.zeros)
    _demand(parked.snapshot_version < INTEGER_END, "HOST_VERSION", "a snapshot's version that can't be")
    _demand(len(parked.engine) <= _MAX_ENGINES, "HOST_ENGINE", "an engine's name that is none")


def _check_exited(exited: pb.WorkerExited) -> None:
    _check_name(exited.instance, exited.epoch, helper=True)
    _demand(0 < exited.pid < _MAX_PID and -64 <= exited.status < 256, "HOST_STATUS", "an end that can't be")
    _demand(len(exited.misbehaved) <= _MAX_TEXT and exited.misbehaved.isprintable(), "HOST_TEXT", "a text")
    if exited.HasField("parked"):
        _check_parked(exited.parked)
        same = (exited.parked.instance, exited.parked.epoch) == (exited.instance, exited.epoch)
        _demand(same, "HOST_INSTANCE", "one instance's end with another one's descriptors")


def _check_hello(hello: pb.HelloReply) -> None:
    texts = (hello.version, hello.engine_version, *hello.engines)
    _demand(len(hello.engines) <= _MAX_ENGINES, "HOST_ENGINE", f"{len(hello.engines)} engines")
    _demand(all(len(text) <= _MAX_TEXT and text.isprintable() for text in texts), "HOST_TEXT", "a version that is none")
    _demand(0 <= hello.pid < _MAX_PID, "HOST_PID", "a process id that can't be")
    for worker in hello.workers:
        _check_name(worker.instance, worker.epoch, helper=True)
        _demand(0 < worker.pid < _MAX_PID and len(worker.engine) <= _MAX_ENGINES, "HOST_PID", "a worker that can't be")
    for exited in hello.exited:
        _check_exited(exited)
    for parked in hello.parked:
        _check_parked(parked)
