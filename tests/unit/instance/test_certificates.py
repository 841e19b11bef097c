"""Listing, revocation and CRLs, over a real store."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from tests.unit.pki.given import TPM, an_ak, an_ek
from tests.unit.store.given import a_new_instance, open_store
from vtpm.errors import InvalidArgumentError, NotFoundError
from vtpm.instance.authority import AuthorityOptions, HostAuthority
from vtpm.instance.certificates import CertificateDesk
from vtpm.pki.model import IssuedCertificate
from vtpm.seal.file_provider import FileKeyProvider
from vtpm.store.model import CertificateRecord
from vtpm.tpm.keys import KeyAlgorithm

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
HOUR = dt.timedelta(hours=1)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[CertificateDesk]:
    store = open_store(f"sqlite:///{tmp_path / 'vtpm.db'}")
    keys = FileKeyProvider(state_dir=tmp_path, options={}, create=True)
    yield CertificateDesk(store, HostAuthority.open(store, keys, AuthorityOptions()))
    store.close()


def recorded(issued: IssuedCertificate, instance: uuid.UUID, algorithm: str) -> CertificateRecord:
    return CertificateRecord(
        serial=issued.serial,
        instance=instance,
        kind=issued.kind,
        algorithm=algorithm,
        der=issued.der,
        not_before=issued.not_before,
        not_after=issued.not_after,
        issuer_key_id=issued.issuer_key_id,
    )


def certified(desk: CertificateDesk, name: str = "web-1") -> tuple[uuid.UUID, list[CertificateRecord]]:
    """Create an instance with an EK and an AK certificate."""
    instance = desk._store.create(a_new_instance(name)).id
    authority = desk.authority.required()
    records = [
        recorded(authority.issue_ak(an_ak(), instance, now=NOW), instance, "ECC_P256"),
        recorded(authority.issue_ek(an_ek(KeyAlgorithm.ECC_P256), TPM, now=NOW), instance, "ECC_P256"),
    ]
    desk._store.certificates.add(records)
    return instance, records


def named(desk: CertificateDesk, key_id: bytes | None = None, now: dt.datetime = NOW) -> dict[int, dt.datetime]:
    return {entry.serial_number: entry.revocation_date_utc for entry in x509.load_der_x509_crl(desk.crl(key_id, now=now))}


def test_certificates_are_listed_by_name_and_id(desk: CertificateDesk) -> None:
    instance, records = certified(desk)
    for ref in ("web-1", str(instance), f"instances/{instance}"):
        assert desk.list(ref, history=False) == records
    with pytest.raises(NotFoundError):
        desk.list("nobody", history=False)
    with pytest.raises(NotFoundError):
        desk.list(str(uuid.uuid4()), history=False)


def test_a_revoked_instance_is_on_the_next_crl(desk: CertificateDesk) -> None:
    _, records = certified(desk)
    assert named(desk) == {}
    assert len(desk.revoke("web-1", "keyCompromise", now=NOW)) == 2
    assert named(desk) == {record.serial: NOW for record in records}
    assert list(desk.revoke("web-1", "superseded", now=NOW)) == []


def test_a_deleted_instance_is_on_the_next_crl_and_can_still_be_asked_for(desk: CertificateDesk) -> None:
    instance, records = certified(desk)
    desk._store.delete(instance, None)
    assert set(named(desk)) == {record.serial for record in records}
    assert {record.revocation_reason for record in desk.list(str(instance), history=True)} == {"cessationOfOperation"}


def test_a_crl_names_the_certificates_of_its_issuer_only(desk: CertificateDesk) -> None:
    old = desk.authority.required()
    _, before = certified(desk)
    desk.authority.rotate()
    _, after = certified(desk, "web-2")
    desk.revoke("web-1", "", now=NOW)
    desk.revoke([after[0].serial], "superseded", now=NOW)
    assert set(named(desk, old.key_id)) == {record.serial for record in before}
    assert set(named(desk)) == {after[0].serial}
    with pytest.raises(NotFoundError) as caught:
        desk.crl(b"nobody")
    assert caught.value.reason == "CA_NOT_FOUND"


def test_a_crl_is_made_anew_when_half_its_time_has_passed(desk: CertificateDesk) -> None:
    first = desk.crl(now=NOW)
    assert desk.crl(now=NOW + 11 * HOUR) == first
    second = desk.crl(now=NOW + 12 * HOUR)
    numbers = [
        x509.load_der_x509_crl(crl).extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        for crl in (first, second)
    ]
    assert numbers == [1, 2]
    # A clock that was set back makes one too: it would be from the future else.
    assert desk.crl(now=NOW - HOUR) != second


def test_who_asks_over_http_gets_what_is_a_moment_old(desk: CertificateDesk) -> None:
    certified(desk)
    path = f"/crl/{desk.authority.required().key_id.hex()}.crl"
    media_type, before = desk.published(path) or ("", b"")
    assert media_type == "application/pkix-crl"
    desk.revoke("web-1", "keyCompromise")
    assert desk.published(path) == (media_type, before)
    assert desk.crl() != before
    assert desk.published(path) == (media_type, desk.crl())


def test_what_is_published(desk: CertificateDesk) -> None:
    authority = desk.authority.required()
    for certificate in authority.chain:
        key_id = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()
        media_type, der = desk.published(f"/ca/{key_id}.cer") or ("", b"")
        assert media_type == "application/pkix-cert"
        assert x509.load_der_x509_certificate(der) == certificate
    for path in ("/", "/ca/", "/ca/zz.cer", "/ca/00.cer", f"/ca/{authority.key_id.hex()}", "/crl/00.crl", "/crl/.crl"):
        assert desk.published(path) is None


def test_unknown_reasons_and_serials_are_refused_whole(desk: CertificateDesk) -> None:
    _, records = certified(desk)
    with pytest.raises(InvalidArgumentError) as caught:
        desk.revoke("web-1", "certificateHold")
    assert caught.value.reason == "REVOCATION_REASON_UNKNOWN"
    with pytest.raises(NotFoundError) as missing:
        desk.revoke([records[0].serial, 77], "superseded")
    assert (missing.value.reason, missing.value.subject) == ("CERTIFICATE_NOT_FOUND", "4d")
    assert named(desk) == {}


def test_the_expired_leave_the_crl_and_the_store(desk: CertificateDesk) -> None:
    instance, records = certified(desk)
    desk.revoke("web-1", "superseded", now=NOW)
    # The AK's is valid for a day, and named for a week more.
    assert len(named(desk, now=NOW + 7 * 24 * HOUR)) == 2
    assert set(named(desk, now=NOW + 9 * 24 * HOUR)) == {records[1].serial}
    assert desk.forget_expired(now=NOW + 9 * 24 * HOUR) == 1
    assert [record.kind for record in desk.list(str(instance), history=True)] == ["EK"]
