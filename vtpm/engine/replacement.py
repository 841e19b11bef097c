"""An engine host of another protocol is emptied and replaced: its TPMs hibernate, and their connections go to a new one.

Only messages that never change are used (link.proto: frozen), so that it works from any version to any later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import time
import uuid
from typing import TYPE_CHECKING, Final

import structlog

from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import EngineError, ErrorKind

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vtpm.engine.committer import Committer
    from vtpm.engine.link import HostLink
    from vtpm.engine.validate import ViolationError

log: Final = structlog.get_logger("vtpm.engine")

# The first protocol that has the frozen messages.
FIRST_REPLACEABLE: Final = 3
_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.05
# Kept, as the event loop itself does not keep its tasks.
_ending: Final[set[asyncio.Task[None]]] = set()


async def empty(host: HostLink, committer: Committer, hello: pb.HelloReply) -> list[tuple[pb.ParkedInstance, list[int]]]:
    """Hibernate what runs in an engine host and take its descriptors; it ends.

    Raises:
        EngineError: ENGINE_HOST_INCOMPATIBLE, it has TPMs that can't hibernate; it and they run on.
    """
    log.warning("engine.host_replaced", pid=hello.pid, version=hello.version, protocol=hello.protocol)
    with contextlib.ExitStack() as lines:
        for worker in await _workers(host):
            await _give_daemon(host, committer, worker, lines)
        await host.request(pb.HostRequest(hibernate_all=pb.HibernateAll()))
        await _all_hibernated(host, hello)
    replies = await host.request(pb.HostRequest(hand_over=pb.HandOver()))
    taken = [(reply.handed_over.parked[0], fds) for reply, fds in replies if reply.handed_over.parked]
    await _ended(hello.pid)
    return taken


async def _all_hibernated(host: HostLink, hello: pb.HelloReply) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while workers := await _workers(host):
        if time.monotonic() > deadline:
            raise EngineError(
                "ENGINE_HOST_INCOMPATIBLE",
                f"the running engine host (version {hello.version}) is of another protocol and can't be replaced, as these "
                f"instances do not hibernate: {', '.join(worker.instance for worker in workers)[:400]}",
                remedy="start the daemon of that version, stop those instances, then start this one",
                kind=ErrorKind.FAILED_PRECONDITION,
            )
        await asyncio.sleep(_POLL_S)


async def _workers(host: HostLink) -> list[pb.RunningWorker]:
    replies = await host.request(pb.HostRequest(hello=pb.Hello()))
    return [worker for reply, _ in replies for worker in reply.hello.workers]


async def _give_daemon(host: HostLink, committer: Committer, worker: pb.RunningWorker, lines: contextlib.ExitStack) -> None:
    """Its own is gone; to hibernate it needs one that takes its snapshot, and an open line to it, which `lines` keeps."""
    operations, its_operations = socket.socketpair()
    commits, its_commits = socket.socketpair()
    lines.enter_context(operations)
    with its_operations, its_commits:
        fds = [its_operations.fileno(), its_commits.fileno()]
        try:
            await host.request(pb.HostRequest(attach=pb.Attach(instance=worker.instance)), fds)
        except EngineError:
            # It has ended meanwhile.
            commits.close()
            return
    loop = asyncio.get_running_loop()

    def end_it(violation: ViolationError) -> None:
        log.error("engine.worker_misbehaved", instance=worker.instance, violation=violation.code, message=violation.text)
        kill = host.request(pb.HostRequest(kill=pb.Kill(instance=worker.instance)))
        _ending.add(task := loop.create_task(_ended_somehow(kill)))
        task.add_done_callback(_ending.discard)

    instance = uuid.UUID(worker.instance.partition("/")[0])
    committer.add(instance, worker.epoch, commits, lambda violation: loop.call_soon_threadsafe(end_it, violation))


async def _ended_somehow(kill: Awaitable[object]) -> None:
    with contextlib.suppress(EngineError):
        await kill


async def _ended(pid: int) -> None:
    """Wait until a process has ended: its socket's name is free then."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            await asyncio.to_thread(select.select, [pidfd], [], [], _TIMEOUT_S)
        finally:
            os.close(pidfd)
