"""kill -9 of the daemon between any two steps of what the pool does: a TPM is in the pool or an instance, and never both."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

import pytest

from tests.faults.test_crash_points import crash_at
from tests.support import raw
from tests.support.daemon import DaemonProcess
from tests.support.pooled import filled, members
from vtpm.api.v1 import certificate_pb2 as cpb
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError

DEFAULT = pb.Profile()
REQUEST_ID = "7d9f3a5e-0f3b-4f6e-9d53-3a7d1f8c2b11"


@pytest.fixture
def pooling() -> Iterator[DaemonProcess]:
    with DaemonProcess(environment={"VTPM_POOL_SIZE": "1"}) as process:
        filled(process, 1)
        yield process


def start_whole(daemon: DaemonProcess) -> None:
    """Start the daemon that died, without a crash point; its store must be whole."""
    del daemon.environment["VTPM_CRASH_POINT"]
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert store.execute("PRAGMA foreign_key_check").fetchall() == []
    daemon.start()


@pytest.mark.parametrize("platform", [pb.Platform(), pb.Platform(model="Another model")])
@pytest.mark.parametrize("point", ["claim.before_commit", "claim.after_commit"])
def test_a_claim_is_whole_or_was_never_made(pooling: DaemonProcess, point: str, platform: pb.Platform) -> None:
    (member,) = members(pooling)
    crash_at(pooling, point)
    with pytest.raises(VtpmError):
        pooling.create("web-1", profile=DEFAULT, platform=platform, request_id=REQUEST_ID)
    pooling.wait_until_dead()
    assert members(pooling) == ({member} if point == "claim.before_commit" else set())
    start_whole(pooling)
    made = pooling.create("web-1", profile=DEFAULT, platform=platform, request_id=REQUEST_ID)
    assert made.id == member
    listed = pooling.client.instances.ListInstances(pb.ListInstancesRequest()).instances
    assert [instance.id for instance in listed] == [member]
    assert member not in filled(pooling, 1)
    raw.succeed(raw.connect(pooling.power_on("web-1").tpm_socket), raw.pcr_read(0))


def test_a_refill_that_was_cut_leaves_nothing(pooling: DaemonProcess) -> None:
    crash_at(pooling, "pool.before_add")
    (member,) = members(pooling)
    made = pooling.create("web-1", profile=DEFAULT)
    assert made.id == member
    pooling.wait_until_dead()
    assert members(pooling) == set()
    start_whole(pooling)
    filled(pooling, 1)


def test_a_member_that_was_to_be_destroyed_is_destroyed(pooling: DaemonProcess) -> None:
    before = members(pooling)
    crash_at(pooling, "pool.before_discard")
    pooling.client.certificates.RotateAuthority(cpb.RotateAuthorityRequest())
    with contextlib.suppress(VtpmError):
        pooling.create("web-1", profile=DEFAULT)
    pooling.wait_until_dead()
    assert members(pooling) == before
    start_whole(pooling)
    filled(pooling, 1, without=before)
