"""Accepting goes on after a bad moment, and peers can't fill the log."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest

from vtpm.wire import listening
from vtpm.wire.listening import QuietLog, accept_forever


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Mock:
    log = Mock()
    monkeypatch.setattr(listening, "log", log)
    return log


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Mock:
    clock = Mock(return_value=100.0)
    monkeypatch.setattr("vtpm.wire.listening.time.monotonic", clock)
    return clock


def test_the_same_about_the_same_is_said_once_in_a_while_with_how_often(log: Mock, clock: Mock) -> None:
    quiet = QuietLog()
    for _ in range(5):
        quiet.warning("refused", "vm-a", name="vm-a")
    quiet.warning("refused", "vm-b", name="vm-b")
    quiet.warning("absent", "vm-a", name="vm-a")
    assert [(call.args[0], call.kwargs) for call in log.warning.call_args_list] == [
        ("refused", {"name": "vm-a"}),
        ("refused", {"name": "vm-b"}),
        ("absent", {"name": "vm-a"}),
    ]
    clock.return_value = 111.0
    quiet.warning("refused", "vm-a", name="vm-a")
    assert log.warning.call_args.kwargs == {"name": "vm-a", "omitted": 4}


@pytest.mark.usefixtures("clock", "log")
def test_subjects_are_not_hoarded() -> None:
    quiet = QuietLog()
    for subject in range(5000):
        quiet.warning("refused", subject)
    assert len(quiet._said) <= listening._MAX_SUBJECTS


async def test_accepting_goes_on_when_descriptors_ran_out(tmp_path: Path, log: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_ACCEPT_RETRY_S", 0.01)
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, [OSError(errno.EMFILE, "Too many open files"), ConnectionAbortedError()]

    async def failing(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", failing)
    accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        task = asyncio.create_task(accept_forever(listener, lambda connection, _: accepted.put_nowait(connection)))
        _, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        (await asyncio.wait_for(accepted.get(), 5)).close()
        assert log.warning.call_count == 2
        writer.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
