"""kill -9 of a worker or the engine host at named places: FAILED with a reason, and what was acknowledged is there."""

from __future__ import annotations

import contextlib

import pytest

from tests.support import raw
from tests.support.daemon import DaemonProcess, worker_pids
from vtpm import crashpoints
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError


def armed(daemon: DaemonProcess, point: str) -> None:
    """Start the daemon with an engine host, so with workers, that die at `point`: where it is passed for the first time."""
    daemon.stop()
    daemon.environment["VTPM_CRASH_POINT"] = point
    daemon.start()


@pytest.fixture
def prepared(own_daemon: DaemonProcess) -> DaemonProcess:
    """A daemon with an instance that is OFF and has a counter; its engine host ends with the daemon."""
    sock = raw.connect(own_daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(sock, raw.nv_increment())
    own_daemon.vtpm("instance", "stop", "web-1")
    return own_daemon


def counter_after_reset(daemon: DaemonProcess) -> int:
    daemon.stop()
    del daemon.environment["VTPM_CRASH_POINT"]
    daemon.start()
    daemon.vtpm("instance", "reset", "web-1")
    return raw.counter_of(raw.connect(daemon.get("web-1").tpm_socket))


@pytest.mark.parametrize("point", ["worker.before_seal", "worker.before_commit", "worker.after_commit"])
def test_a_worker_that_dies_around_its_commit_never_answers_what_is_not_durable(prepared: DaemonProcess, point: str) -> None:
    daemon = prepared
    on = daemon.power_on("web-1")
    start = raw.counter_of(raw.connect(on.tpm_socket))
    daemon.vtpm("instance", "stop", "web-1")
    armed(daemon, f"{point}:2")
    sock = raw.connect(daemon.power_on("web-1", pb.STARTUP_NONE).tpm_socket)
    acknowledged = 0
    with contextlib.suppress(OSError):
        raw.ask(sock, raw.startup_clear())
        while raw.ask(sock, raw.nv_increment()):
            acknowledged += 1
            assert acknowledged < 10, "the crash point was never passed"
    failed = daemon.until("web-1", pb.FAILED)
    assert failed.failure.reason == "WORKER_LOST"
    after = counter_after_reset(daemon)
    # The one in flight is there or not, whole.
    assert start + acknowledged <= after <= start + acknowledged + 1


@pytest.mark.parametrize("point", ["worker.after_unseal", "host.before_fork", "host.after_fork"])
def test_a_power_on_that_is_cut_off_can_be_done_again(prepared: DaemonProcess, point: str) -> None:
    daemon = prepared
    armed(daemon, point)
    with pytest.raises(VtpmError):
        daemon.power_on("web-1")
    daemon.kill()
    del daemon.environment["VTPM_CRASH_POINT"]
    daemon.start()
    state = daemon.get("web-1").state
    assert state in (pb.OFF, pb.FAILED)
    daemon.vtpm("instance", "start" if state == pb.OFF else "reset", "web-1")
    raw.succeed(raw.connect(daemon.get("web-1").tpm_socket), raw.nv_increment())


def test_a_creation_whose_worker_dies_can_be_done_again(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    armed(daemon, "worker.after_manufacture")
    with pytest.raises(VtpmError):
        daemon.create("web-1")
    daemon.kill()
    del daemon.environment["VTPM_CRASH_POINT"]
    daemon.start()
    assert not daemon.client.instances.ListInstances(pb.ListInstancesRequest()).instances


@pytest.mark.parametrize("point", ["power_on.after_acquire", "power_on.after_load"])
def test_a_daemon_that_dies_while_it_powers_on_leaves_no_half(prepared: DaemonProcess, point: str) -> None:
    daemon = prepared
    armed(daemon, point)
    with pytest.raises(VtpmError):
        daemon.power_on("web-1")
    daemon.wait_until_dead()
    del daemon.environment["VTPM_CRASH_POINT"]
    daemon.start()
    now = daemon.get("web-1")
    if now.state == pb.FAILED:
        daemon.vtpm("instance", "reset", "web-1")
    raw.succeed(raw.connect(daemon.get("web-1").tpm_socket), raw.pcr_read(0))


def test_a_daemon_that_died_while_it_made_a_tpm_leaves_no_worker_behind(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    daemon.running("keeps-the-engine-host")
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    # RSA takes a while; the daemon dies meanwhile.
    made = daemon.client.instances.CreateInstance.future(
        pb.CreateInstanceRequest(name="half", profile=pb.Profile(ek_algorithms=[pb.RSA_3072, pb.RSA_2048]))
    )
    while len(worker_pids(host)) < 2:
        assert not made.done()
    daemon.kill()
    daemon.start()
    assert daemon.get("keeps-the-engine-host").state == pb.ON
    daemon.create("half")


def test_outside_of_the_test_build_there_are_no_crash_points() -> None:
    asked = {"VTPM_CRASH_POINT": "commit.before_sync:2"}
    assert crashpoints.parse(asked) is None
    assert crashpoints.inherited(asked) == {}
    build = {"VTPM_TEST_BUILD": "1"}
    assert crashpoints.parse(asked | build) == ("commit.before_sync", 2)
    assert crashpoints.inherited(asked | build | {"SECRET": "x"}) == asked | build
    assert crashpoints.parse(build) is None
