"""The daemon's end of a worker's line: each request has one answer or none, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Awaitable, Callable

import pytest

from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError
from vtpm.engine.worker_link import WorkerLink
from vtpm.errors import EngineError

DONE = pb.WorkerReply(done=pb.Done())
IMPORTED = pb.WorkerReply(imported=pb.Imported())
TOUCHED = pb.WorkerReply(identity_touched=pb.IdentityTouched())


class Worker:
    """The other end, which a test speaks for."""

    def __init__(self, link: WorkerLink, sock: socket.socket) -> None:
        self.link = link
        self.sock = sock
        self.told: list[str] = []
        self.violations: list[str] = []
        self._news = asyncio.Event()
        link.on_imported = lambda: self._hear("imported")
        link.on_identity_touched = lambda: self._hear("touched")
        link.on_violation = self._on_violation

    def _hear(self, what: str) -> None:
        self.told.append(what)
        self._news.set()

    def _on_violation(self, violation: ViolationError) -> None:
        self.violations.append(violation.code)

    def say(self, *replies: pb.WorkerReply) -> None:
        self.sock.sendall(b"".join(frame(reply.SerializeToString()) for reply in replies))

    async def asked(self) -> pb.WorkerRequest:
        data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        return pb.WorkerRequest.FromString(FrameReader().feed(data)[0])

    async def ended(self) -> str:
        await asyncio.wait_for(self.link.gone.wait(), 20)
        (code,) = self.violations
        return code

    async def heard(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.told) < count:
                self._news.clear()
                await self._news.wait()


def on_a_line(test: Callable[[Worker], Awaitable[None]]) -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setblocking(False)
            link = await WorkerLink.open(uuid.uuid4(), ours, 0)
            await test(Worker(link, theirs))
            link.close()

    asyncio.run(run())


@pytest.mark.parametrize("unasked", [IMPORTED, TOUCHED])
def test_what_is_said_again_before_it_was_answered_ends_the_worker(unasked: pb.WorkerReply) -> None:
    async def test(worker: Worker) -> None:
        worker.say(unasked)
        await worker.heard(1)
        worker.say(unasked)
        assert await worker.ended() == "UNASKED_AGAIN"
        assert len(worker.told) == 1

    on_a_line(test)


def test_after_the_keys_were_asked_for_it_may_be_said_again() -> None:
    async def test(worker: Worker) -> None:
        for turn in range(1, 4):
            worker.say(IMPORTED, TOUCHED)
            await worker.heard(2 * turn)
            forget = asyncio.create_task(worker.link.forget_identity(1))
            request = await worker.asked()
            worker.say(pb.WorkerReply(id=request.id, keys=pb.Keys()))
            await forget
        assert not worker.violations

    on_a_line(test)


def test_a_reply_to_nothing_ends_the_worker() -> None:
    async def test(worker: Worker) -> None:
        worker.say(pb.WorkerReply(id=5, done=pb.Done()))
        assert await worker.ended() == "REPLY_UNKNOWN"

    on_a_line(test)


def test_a_second_reply_ends_the_worker_and_the_first_one_counts() -> None:
    async def test(worker: Worker) -> None:
        asking = asyncio.create_task(worker.link.reset(startup_clear=False))
        request = await worker.asked()
        reply = pb.WorkerReply(id=request.id, done=pb.Done())
        worker.say(reply)
        await asking
        worker.say(reply)
        assert await worker.ended() == "REPLY_UNKNOWN"

    on_a_line(test)


def test_whoever_waits_for_a_worker_that_misbehaves_is_told_so() -> None:
    async def test(worker: Worker) -> None:
        asking = asyncio.create_task(worker.link.status())
        request = await worker.asked()
        worker.say(pb.WorkerReply(id=request.id, done=pb.Done()))
        with pytest.raises(EngineError) as refused:
            await asking
        assert refused.value.reason == "WORKER_MISBEHAVED"
        assert "REPLY_KIND" in refused.value.message

    on_a_line(test)


def test_a_request_without_an_answer_ends_in_time_and_a_late_answer_is_no_violation() -> None:
    async def test(worker: Worker) -> None:
        with pytest.raises(EngineError) as refused:
            await worker.link.request(pb.WorkerRequest(get_status=pb.GetStatus()), timeout_s=0.01)
        assert refused.value.reason == "WORKER_TIMEOUT"
        request = await worker.asked()
        worker.say(pb.WorkerReply(id=request.id, status=pb.Status()))
        asking = asyncio.create_task(worker.link.status())
        request = await worker.asked()
        worker.say(pb.WorkerReply(id=request.id, status=pb.Status(version=7)))
        assert (await asking).version == 7
        assert not worker.violations

    on_a_line(test)


def test_of_a_worker_that_does_not_answer_only_so_much_is_asked() -> None:
    async def test(worker: Worker) -> None:
        asking = [asyncio.create_task(worker.link.status()) for _ in range(2000)]
        done, waiting = await asyncio.wait(asking, timeout=1)
        assert len(waiting) <= 512
        assert {task.exception().reason for task in done} == {"WORKER_BUSY"}  # type: ignore[union-attr]
        for task in waiting:
            task.cancel()

    on_a_line(test)


def test_what_a_worker_reads_and_never_answers_is_not_kept_for_it() -> None:
    """The guest of a worker that is its own asks for as much as it likes, and lets go of each request."""

    async def test(worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(20):
            measure = pb.Measure(pcr=16, data=b"x" * (1 << 20), event_data=b"y" * 4096)
            asking = asyncio.create_task(worker.link.request(pb.WorkerRequest(measure=measure)))
            read = 0
            while read <= 1 << 20:
                read += len(await loop.sock_recv(worker.sock, 1 << 20))
            asking.cancel()
        assert sum(request.ByteSize() for request, _ in worker.link._pending.values()) < 1 << 10

    on_a_line(test)


def test_a_frame_that_nobody_asked_for_is_refused_before_it_is_kept() -> None:
    async def test(worker: Worker) -> None:
        worker.sock.send((1 << 20).to_bytes(4, "big"))
        assert await worker.ended() == "FRAME_TOO_LARGE"

    on_a_line(test)
