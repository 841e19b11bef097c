"""kill -9 of the daemon while it deals with what a guest did to its keys, and while it renews."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.test_crash_points import crash_at, heal
from tests.support.certs import certificates, revoked_serials
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError

_FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
AK = ("AK", "ECC_P256")


@pytest.fixture
def hourly() -> Iterator[DaemonProcess]:
    """AK certificates that last an hour."""
    with DaemonProcess(environment={"VTPM_CA_AK_LIFETIME_HOURS": "1"}) as process:
        yield process


def tool(instance: pb.Instance, *command: str) -> bytes:
    env = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": f"swtpm:path={instance.tpm_socket}"}
    return subprocess.run(command, env=env, capture_output=True, check=True, timeout=60).stdout


def test_a_new_seed_is_noticed_by_the_next_daemon(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    daemon.create("web-1")
    crash_at(daemon, "identity.before_commit")
    instance = daemon.power_on("web-1", pb.STARTUP_NONE)
    tool(instance, "tpm2_startup", "-c")
    tool(instance, "tpm2_changeeps")
    heal(daemon)
    deadline = time.monotonic() + 10
    while daemon.get("web-1").identity != pb.CHANGED:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert int(certificates(daemon, "web-1")["EK", "ECC_P256"].serial, 16) in revoked_serials(daemon)


def test_a_new_seed_without_a_daemon_is_noticed_by_the_next(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    daemon.create("web-1")
    instance = daemon.power_on("web-1", pb.STARTUP_NONE)
    tool(instance, "tpm2_startup", "-c")
    daemon.kill()
    # It needs a daemon to become durable; the answer comes when there is one.
    env = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": f"swtpm:path={instance.tpm_socket}"}
    waiting = subprocess.Popen(["tpm2_changeeps"], env=env)
    daemon.start()
    assert waiting.wait(20) == 0
    deadline = time.monotonic() + 10
    while daemon.get("web-1").identity != pb.CHANGED:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not _FAKETIME, reason="libfaketime is not installed")
def test_a_renewal_of_one_that_is_off_is_whole_or_not_there(hourly: DaemonProcess) -> None:
    hourly.create("web-1")
    before = certificates(hourly, "web-1")[AK]
    hourly.environment |= {"LD_PRELOAD": str(_FAKETIME[0]), "FAKETIME": "+45m", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    crash_at(hourly, "renew.before_commit")
    with pytest.raises(VtpmError):
        hourly.power_on("web-1")
    heal(hourly)
    assert certificates(hourly, "web-1")[AK].serial == before.serial
    instance = hourly.power_on("web-1")
    after = certificates(hourly, "web-1")[AK]
    assert after.serial != before.serial
    assert tool(instance, "tpm2_nvread", "0x01C10002", "-C", "o").startswith(after.der)
