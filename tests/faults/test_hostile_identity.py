"""A worker lies about its keys, in a real engine host: nothing is certified for it, and its neighbour notices nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from tests.integration.test_renewal import restart_later
from tests.support import raw
from tests.support.certs import certificates
from tests.support.daemon import DaemonProcess, kill_all, spare_pids
from tests.support.liar import Liar
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError
from vtpm.tpm.keys import KeyAlgorithm, ObjectAttribute, ak_template, template_with

AK = ("AK", "ECC_P256")


@pytest.fixture
def liar(tmp_path: Path) -> Liar:
    return Liar(tmp_path)


@pytest.fixture
def daemon(liar: Liar) -> Iterator[DaemonProcess]:
    """A daemon over workers that may lie; web-1 runs and is honest."""
    environment = {"PYTHONPATH": str(liar.path), "VTPM_CA_AK_LIFETIME_HOURS": "1", "VTPM_POOL_SIZE": "0"}
    with DaemonProcess(environment=environment) as process:
        process.running("web-1")
        yield process


def from_now_on(daemon: DaemonProcess, liar: Liar, **lie: object) -> None:
    """Have the next workers lie; those that wait already would be honest."""
    liar.says(**lie)
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    before = set(spare_pids(host))
    kill_all(before)
    eventually(lambda: bool(now := set(spare_pids(host))) and not now & before, 20, told=daemon.log_text)


def is_honest(daemon: DaemonProcess, before: bytes) -> None:
    """web-1 has the certificate that it had, and answers."""
    assert certificates(daemon, "web-1")[AK].der == before
    raw.succeed(raw.connect(daemon.get("web-1").tpm_socket), raw.pcr_read(0))


def refused_creation(daemon: DaemonProcess) -> VtpmError:
    with pytest.raises(VtpmError) as caught:
        daemon.create("web-2")
    assert [item.name for item in daemon.client.instances.ListInstances(pb.ListInstancesRequest()).instances] == ["web-1"]
    return caught.value


def a_software_key() -> bytes:
    return template_with(ak_template(KeyAlgorithm.ECC_P256), ec.generate_private_key(ec.SECP256R1()).public_key())


def test_a_software_key_is_not_certified(daemon: DaemonProcess, liar: Liar) -> None:
    before = certificates(daemon, "web-1")[AK].der
    from_now_on(daemon, liar, publics={"AK": a_software_key().hex()})
    assert refused_creation(daemon).reason == "TPM_ERROR"
    is_honest(daemon, before)


def test_another_instance_s_ak_is_not_certified(daemon: DaemonProcess, liar: Liar) -> None:
    before = certificates(daemon, "web-1")[AK].der
    (theirs,) = (key.tpmt_public for key in daemon.get("web-1").keys if key.role == pb.AK)
    from_now_on(daemon, liar, publics={"AK": theirs.hex()})
    assert refused_creation(daemon).reason == "TPM_ERROR"
    # Nor if it says that the TPM opened the credential.
    from_now_on(daemon, liar, publics={"AK": theirs.hex()}, secret=bytes(32).hex())
    assert refused_creation(daemon).reason == "IDENTITY_NOT_PROVEN"
    is_honest(daemon, before)


@pytest.mark.parametrize(
    "attribute",
    [
        ObjectAttribute.RESTRICTED,
        ObjectAttribute.FIXED_TPM | ObjectAttribute.FIXED_PARENT,
        ObjectAttribute.SENSITIVE_DATA_ORIGIN,
    ],
)
def test_a_key_that_is_no_ak_is_not_certified(daemon: DaemonProcess, liar: Liar, attribute: ObjectAttribute) -> None:
    """The TPM really has it, and proves it; or does not even make it."""
    before = certificates(daemon, "web-1")[AK].der
    from_now_on(daemon, liar, without=int(attribute))
    assert refused_creation(daemon).reason in ("IDENTITY_NOT_PROVEN", "TPM_ERROR")
    is_honest(daemon, before)


def test_who_does_not_prove_its_keys_is_not_renewed(daemon: DaemonProcess, liar: Liar) -> None:
    daemon.create("web-2")
    from_now_on(daemon, liar, secret=bytes(32).hex())
    daemon.power_on("web-2")
    honest, lying = (certificates(daemon, name)[AK].serial for name in ("web-1", "web-2"))
    restart_later(daemon, 45)
    eventually(lambda: certificates(daemon, "web-1")[AK].serial != honest, 20, told=daemon.log_text)
    eventually(lambda: "IDENTITY_NOT_PROVEN" in daemon.log_text(), 20, told=daemon.log_text)
    assert certificates(daemon, "web-2")[AK].serial == lying
    assert daemon.get("web-2").state == pb.ON


def test_a_list_of_keys_decides_nothing(daemon: DaemonProcess, liar: Liar) -> None:
    """A running worker that shows its neighbour's keys for its own: what is renewed is the key that was certified for it."""
    daemon.create("web-2")
    theirs = {"AK" if key.role == pb.AK else "EK": key.tpmt_public.hex() for key in daemon.get("web-1").keys}
    from_now_on(daemon, liar, publics=theirs)
    daemon.power_on("web-2")
    before = {name: certificates(daemon, name)[AK] for name in ("web-1", "web-2")}
    restart_later(daemon, 45)
    for name, old in before.items():
        eventually(lambda name=name, old=old: certificates(daemon, name)[AK].serial != old.serial, 20, told=daemon.log_text)  # type: ignore[misc]
        was, now = (x509.load_der_x509_certificate(item.der) for item in (old, certificates(daemon, name)[AK]))
        assert now.public_key() == was.public_key()
