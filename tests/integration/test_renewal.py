"""AK certificates are renewed while their instance lives; a clock that is ahead makes them due."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509

from tests.integration.conftest import Tool
from tests.support import raw
from tests.support.certs import certificates, chain
from tests.support.daemon import DaemonProcess
from tests.support.waiting import eventually
from vtpm.api.v1 import certificate_pb2 as cpb
from vtpm.api.v1 import instance_pb2 as pb

Bind = Callable[[pb.Instance], Tool]
AK_INDEX = "0x01C10002"
AK = ("AK", "ECC_P256")
_LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


@pytest.fixture
def hourly() -> Iterator[DaemonProcess]:
    """A daemon whose AK certificates last an hour, so that they are due after 40 minutes."""
    with DaemonProcess(environment={"VTPM_CA_AK_LIFETIME_HOURS": "1"}) as process:
        yield process


def restart_later(daemon: DaemonProcess, minutes: int) -> None:
    """Stop the daemon; the next one's clock is ahead. What is ON runs on."""
    if not _LIBRARIES:
        pytest.skip("libfaketime is not installed")
    daemon.stop()
    daemon.environment |= {"LD_PRELOAD": str(_LIBRARIES[0]), "FAKETIME": f"+{minutes}m", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    daemon.start()


def renewed(daemon: DaemonProcess, name: str, before: cpb.Certificate) -> cpb.Certificate:
    deadline = time.monotonic() + 10
    while (now := certificates(daemon, name)[AK]).serial == before.serial:
        assert time.monotonic() < deadline, daemon.log_text()[-2000:]
        time.sleep(0.05)
    return now


def test_a_running_instance_gets_a_new_one_without_noticing(hourly: DaemonProcess, tool: Bind) -> None:
    instance = hourly.running("web-1")
    run = tool(instance)
    sock = raw.connect(instance.tpm_socket)
    raw.succeed(sock, raw.pcr_read(0))
    before = certificates(hourly, "web-1")[AK]
    public = run("tpm2_nvreadpublic", AK_INDEX).stdout
    restart_later(hourly, 45)
    after = renewed(hourly, "web-1", before)
    # The daemon renews the one in NV first.
    contents = run("tpm2_nvread", AK_INDEX, "-C", "o").stdout
    assert contents.startswith(after.der)
    assert not contents[len(after.der) :].strip(b"\0")
    assert run("tpm2_nvreadpublic", AK_INDEX).stdout == public
    old, new = (x509.load_der_x509_certificate(item.der) for item in (before, after))
    assert new.public_key() == old.public_key()
    assert new.not_valid_after_utc - old.not_valid_after_utc > dt.timedelta(minutes=30)
    assert not after.revocation_reason
    # The connection of the VM is the one that it had, and nothing is left in the TPM.
    raw.succeed(sock, raw.pcr_read(0))
    for kind in ("handles-transient", "handles-loaded-session", "handles-saved-session"):
        assert run("tpm2_getcap", kind).stdout == b""
    # The state is durable: the same after a power cycle.
    hourly.vtpm("instance", "stop", "web-1")
    again = tool(hourly.power_on("web-1"))
    assert again("tpm2_nvread", AK_INDEX, "-C", "o").stdout == contents


def test_one_that_was_off_has_a_new_one_when_it_is_powered_on(hourly: DaemonProcess, tool: Bind) -> None:
    hourly.create("web-1")
    before = certificates(hourly, "web-1")[AK]
    restart_later(hourly, 45)
    assert certificates(hourly, "web-1")[AK].serial == before.serial
    run = tool(hourly.power_on("web-1"))
    after = certificates(hourly, "web-1")[AK]
    assert after.serial != before.serial
    assert run("tpm2_nvread", AK_INDEX, "-C", "o").stdout.startswith(after.der)
    assert run("tpm2_nvread", "0x01C0000A").stdout == certificates(hourly, "web-1")["EK", "ECC_P256"].der


def test_one_whose_firmware_took_the_index_away_has_it_by_the_api(hourly: DaemonProcess, tool: Bind) -> None:
    hourly.create("web-1")
    run = tool(hourly.power_on("web-1", pb.STARTUP_NONE))
    run("tpm2_startup", "-c")
    run("tpm2_nvundefine", AK_INDEX, "-C", "p")
    before = certificates(hourly, "web-1")[AK]
    restart_later(hourly, 45)
    renewed(hourly, "web-1", before)
    assert "NV_INDEX_MISSING" in hourly.log_text()
    # With the next power on it is there again.
    hourly.vtpm("instance", "stop", "web-1")
    restart_later(hourly, 95)
    again = tool(hourly.power_on("web-1"))
    assert again("tpm2_nvread", AK_INDEX, "-C", "o").stdout.startswith(certificates(hourly, "web-1")[AK].der)


def test_a_renewal_comes_from_the_ca_in_force(hourly: DaemonProcess) -> None:
    hourly.running("web-1")
    before = certificates(hourly, "web-1")[AK]
    hourly.client.certificates.RotateAuthority(cpb.RotateAuthorityRequest())
    restart_later(hourly, 45)
    after = renewed(hourly, "web-1", before)
    x509.load_der_x509_certificate(after.der).verify_directly_issued_by(chain(hourly)[0])


def test_an_ak_that_is_gone_is_not_certified_again(hourly: DaemonProcess, tool: Bind) -> None:
    hourly.create("web-1")
    run = tool(hourly.power_on("web-1", pb.STARTUP_NONE))
    run("tpm2_startup", "-c")
    run("tpm2_evictcontrol", "-C", "p", "-c", "0x81800003")
    before = certificates(hourly, "web-1")[AK]
    restart_later(hourly, 45)
    time.sleep(2)
    assert certificates(hourly, "web-1")[AK].serial == before.serial


def test_a_hibernated_one_is_renewed_when_it_wakes_and_not_woken_for_it(hourly: DaemonProcess) -> None:
    instance = hourly.running("web-1")
    hourly.running("web-2")
    before = {name: certificates(hourly, name)[AK] for name in ("web-1", "web-2")}
    hourly.hibernate("web-1")
    restart_later(hourly, 45)
    # A turn of the renewal has passed when the other has a new one.
    renewed(hourly, "web-2", before["web-2"])
    assert hourly.get("web-1").hibernated
    assert certificates(hourly, "web-1")[AK].serial == before["web-1"].serial
    raw.succeed(raw.connect(instance.tpm_socket), raw.pcr_read(0))
    renewed(hourly, "web-1", before["web-1"])


def test_after_a_clear_the_ek_is_made_again_for_the_proof(hourly: DaemonProcess, tool: Bind) -> None:
    run = tool(hourly.running("web-1"))
    run("tpm2_clear", "-c", "l")
    assert b"0x81010002" not in run("tpm2_getcap", "handles-persistent").stdout
    before = certificates(hourly, "web-1")[AK]
    restart_later(hourly, 45)
    renewed(hourly, "web-1", before)
    for kind in ("handles-transient", "handles-loaded-session", "handles-saved-session"):
        assert run("tpm2_getcap", kind).stdout == b""


def test_a_guest_with_an_endorsement_auth_keeps_the_certificate_that_it_has(hourly: DaemonProcess, tool: Bind) -> None:
    run = tool(hourly.running("web-1"))
    run("tpm2_changeauth", "-c", "e", "secret")
    before = certificates(hourly, "web-1")[AK]
    restart_later(hourly, 45)
    eventually(lambda: "renewal.failed" in hourly.log_text(), 20, told=hourly.log_text)
    assert certificates(hourly, "web-1")[AK].serial == before.serial
    for kind in ("handles-transient", "handles-loaded-session", "handles-saved-session"):
        assert run("tpm2_getcap", kind).stdout == b""
    # With its auth back to what it was it is renewed at the next turn.
    run("tpm2_changeauth", "-c", "e", "-p", "secret")
    hourly.stop()
    hourly.start()
    renewed(hourly, "web-1", before)


@pytest.mark.parametrize("layout", [pb.AZURE, pb.GCE])
def test_the_aks_of_a_cloud_s_agents_are_proven_and_renewed(hourly: DaemonProcess, layout: pb.NvLayout.ValueType) -> None:
    hourly.running("web-1", profile=pb.Profile(ek_algorithms=[pb.RSA_2048], nv_layout=layout))
    before = certificates(hourly, "web-1")
    restart_later(hourly, 45)
    for kind, algorithm in [key for key in before if key[0] in ("AK", "GUEST_AK")]:
        eventually(
            lambda key=(kind, algorithm): certificates(hourly, "web-1")[key].serial != before[key].serial,  # type: ignore[misc]
            20,
            told=hourly.log_text,
        )
