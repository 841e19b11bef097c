"""TPMs made ahead: nobody sees them, each becomes one instance once, and what no longer fits is destroyed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.integration.conftest import Tool
from tests.support.certs import certificates, chain, revoked_serials
from tests.support.daemon import DaemonProcess
from tests.support.pooled import filled, members
from vtpm.api.v1 import certificate_pb2 as cpb
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError

DEFAULT = pb.Profile()
SIZE = 2


@pytest.fixture
def pooling() -> Iterator[DaemonProcess]:
    """A daemon whose pool is full."""
    with DaemonProcess(environment={"VTPM_POOL_SIZE": str(SIZE)}) as process:
        filled(process, SIZE)
        yield process


def listed(daemon: DaemonProcess) -> list[pb.Instance]:
    return list(daemon.client.instances.ListInstances(pb.ListInstancesRequest()).instances)


def test_nobody_sees_a_member(pooling: DaemonProcess) -> None:
    assert listed(pooling) == []
    assert not any(pooling.client.host.GetHost(pb.GetHostRequest()).instances.values())
    for member in members(pooling):
        for name in (member, f"@{member}"):
            for call in (
                lambda ref=name: pooling.get(ref),
                lambda ref=name: pooling.power_on(ref),
                lambda ref=name: pooling.client.call(
                    pooling.client.instances.DeleteInstance, pb.DeleteInstanceRequest(instance=ref)
                ),
            ):
                with pytest.raises(VtpmError) as raised:
                    call()
                assert raised.value.reason == "INSTANCE_NOT_FOUND"
    assert len(members(pooling)) == SIZE


def test_a_creation_takes_a_member_and_the_pool_fills_up_again(
    pooling: DaemonProcess, tool: Callable[[pb.Instance], Tool]
) -> None:
    before = members(pooling)
    made = pooling.create("web-1", profile=DEFAULT, labels={"team": "web"})
    assert made.id in before
    assert (made.name, dict(made.labels), made.state, made.identity) == ("web-1", {"team": "web"}, pb.OFF, pb.CERTIFIED)
    known = certificates(pooling, "web-1")
    assert set(known) == {("EK", "RSA_2048"), ("EK", "ECC_P384"), ("AK", "ECC_P256"), ("PLATFORM", "")}
    run = tool(pooling.power_on("web-1"))
    assert run("tpm2_nvread", "0x01C00002").stdout == known["EK", "RSA_2048"].der
    after = filled(pooling, SIZE, without={made.id})
    assert made.id not in after
    assert len(listed(pooling)) == 1


def test_each_member_becomes_one_instance(pooling: DaemonProcess) -> None:
    made = [pooling.create(f"web-{number}", profile=DEFAULT) for number in range(SIZE + 2)]
    assert len({instance.id for instance in made}) == SIZE + 2
    keys = {key.tpmt_public for instance in made for key in instance.keys}
    assert len(keys) == 3 * (SIZE + 2)


def test_a_member_is_named_by_its_id_when_nobody_names_it(pooling: DaemonProcess) -> None:
    made = pooling.create("", profile=DEFAULT)
    assert made.name == f"vtpm-{made.id.replace('-', '')[:12]}"


def test_members_outlive_the_daemon(pooling: DaemonProcess) -> None:
    before = members(pooling)
    pooling.kill()
    pooling.start()
    assert members(pooling) == before
    assert pooling.create("web-1", profile=DEFAULT).id in before


def test_a_taken_name_uses_nobody_up(pooling: DaemonProcess) -> None:
    pooling.create("web-1", profile=DEFAULT)
    before = filled(pooling, SIZE)
    with pytest.raises(VtpmError) as raised:
        pooling.create("web-1", profile=DEFAULT)
    assert raised.value.reason == "INSTANCE_NAME_TAKEN"
    assert members(pooling) == before


def test_a_retry_gives_the_same_instance(pooling: DaemonProcess) -> None:
    request_id = "7d9f3a5e-0f3b-4f6e-9d53-3a7d1f8c2b11"
    first = pooling.create("web-1", profile=DEFAULT, request_id=request_id)
    assert pooling.create("web-1", profile=DEFAULT, request_id=request_id).id == first.id


def test_another_profile_is_made_for_it(pooling: DaemonProcess) -> None:
    before = members(pooling)
    assert pooling.create("web-1").id not in before
    assert members(pooling) == before


def test_another_platform_is_certified_and_written_anew(pooling: DaemonProcess, tool: Callable[[pb.Instance], Tool]) -> None:
    before = members(pooling)
    made = pooling.create("web-1", profile=DEFAULT, platform=pb.Platform(model="Another model"))
    assert made.id in before
    known = certificates(pooling, "web-1")
    der = known["PLATFORM", ""].der
    assert b"Another model" in der
    old = certificates(pooling, "web-1", history=True)["PLATFORM", ""]
    assert old.serial == known["PLATFORM", ""].serial or old.revocation_reason == "superseded"
    run = tool(pooling.power_on("web-1"))
    assert run("tpm2_nvread", "0x01C08000").stdout == der
    assert run("tpm2_nvread", "0x01C00002").stdout == known["EK", "RSA_2048"].der


def test_members_of_another_ca_are_destroyed(pooling: DaemonProcess) -> None:
    before = members(pooling)
    pooling.client.certificates.RotateAuthority(cpb.RotateAuthorityRequest())
    made = pooling.create("web-1", profile=DEFAULT)
    assert made.id not in before
    issuer = chain(pooling)[0]
    from cryptography import x509

    x509.load_der_x509_certificate(certificates(pooling, "web-1")["EK", "RSA_2048"].der).verify_directly_issued_by(issuer)
    filled(pooling, SIZE, without=before)


def test_without_a_pool_what_was_left_is_destroyed(pooling: DaemonProcess) -> None:
    pooling.stop()
    pooling.environment["VTPM_POOL_SIZE"] = "0"
    pooling.start()
    filled(pooling, 0)
    # Their certificates are on the CRL: two EKs, AK and platform each.
    assert len(revoked_serials(pooling)) == 4 * SIZE


def test_a_key_rotation_reaches_members_too(pooling: DaemonProcess) -> None:
    before = members(pooling)
    assert pooling.client.host.RotateKey(pb.RotateKeyRequest()).rewrapped >= SIZE
    made = pooling.create("web-1", profile=DEFAULT)
    assert made.id in before
    assert pooling.power_on("web-1").state == pb.ON
