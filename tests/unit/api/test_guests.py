"""Guests' servers as instances come, sleep and go, with real gRPC at both ends."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from tests.unit.store.given import created_on, open_store
from vtpm.api.guests import GuestServers
from vtpm.api.ports import Instances
from vtpm.instance.model import InstanceChange
from vtpm.store.model import InstanceRecord
from vtpm.store.store import Store
from vtpm.wire.guarded import GuestFlow
from vtpm.wire.shares import ConnectionShares


class Known:
    """Tells of one instance, as the manager does."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.changed: Callable[[InstanceChange], None]
        self.hibernated: Callable[[uuid.UUID], None]

    def subscribe(self, heard: Callable[[InstanceChange], None]) -> None:
        self.changed = heard

    def subscribe_hibernation(self, heard: Callable[[uuid.UUID], None]) -> None:
        self.hibernated = heard

    def guest_socket(self, _record: InstanceRecord) -> Path:
        return self._directory / "guest.sock"


class Served:
    """An instance that is ON, and `in_between`: what happens while the next server for it is made."""

    def __init__(self, record: InstanceRecord, directory: Path) -> None:
        self.record = record
        self.known = Known(directory)
        self.in_between: list[Callable[[], Any]] = []
        self.servers = GuestServers(
            cast("Instances", self.known),
            self._make,
            directory / "guests",
            ConnectionShares(4, 16),
            largest_message=1 << 20,
            message_timeout_s=10,
        )

    def _make(self, _record: InstanceRecord, _flow: GuestFlow) -> grpc.aio.Server:
        if self.in_between:
            self.in_between.pop()()
        return grpc.aio.server()

    async def answer(self) -> grpc.StatusCode:
        """What a new client's call ends with; a server without any service says UNIMPLEMENTED."""
        async with grpc.aio.insecure_channel(f"unix:{self.known.guest_socket(self.record)}") as channel:
            ask: Any = channel.unary_unary("/x/Y")
            try:
                await ask(b"", timeout=30)
            except grpc.aio.AioRpcError as error:
                return error.code()
        raise AssertionError("nobody serves that")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path / 'vtpm.db'}")
    yield opened
    opened.close()


@pytest.fixture
async def served(store: Store, tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(created_on(store), tmp_path)
    made.servers.follow()
    made.known.changed(InstanceChange("UPDATED", made.record))
    await made.servers.settled(made.record.id)
    yield made
    await made.servers.close(None)


async def test_who_connects_while_the_instance_falls_asleep_is_answered(served: Served) -> None:
    served.in_between.append(lambda: served.known.hibernated(served.record.id))
    assert await served.answer() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_server_that_can_not_be_made_is_made_for_the_next(served: Served) -> None:
    def fail() -> None:
        raise RuntimeError("out of something")

    served.in_between.append(fail)
    assert await served.answer() is grpc.StatusCode.UNAVAILABLE
    assert await served.answer() is grpc.StatusCode.UNIMPLEMENTED
