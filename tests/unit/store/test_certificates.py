"""Issued certificates in the store."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from typing import Any

from tests.unit.store.given import a_new_instance
from vtpm.store.model import CertificateRecord
from vtpm.store.store import Store

NOW = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
ISSUER = bytes(range(20))


def a_certificate(instance: uuid.UUID, serial: int, **changes: Any) -> CertificateRecord:
    values: dict[str, Any] = {
        "serial": serial,
        "instance": instance,
        "kind": "EK",
        "algorithm": "RSA_2048",
        "der": b"der %d" % serial,
        "not_before": NOW,
        "not_after": NOW + 10 * DAY,
        "issuer_key_id": ISSUER,
    }
    return CertificateRecord(**{**values, **changes})


def test_certificates_are_read_back_as_they_were(store: Store) -> None:
    instance = uuid.uuid4()
    added = [a_certificate(instance, (1 << 159) - 1), a_certificate(instance, 1, kind="PLATFORM", algorithm="")]
    store.certificates.add(added)
    assert store.certificates.current(instance) == added
    assert store.certificates.by_serials([1]) == [added[1]]
    assert store.certificates.current(uuid.uuid4()) == []


def test_renewal_keeps_the_old_one_on_record(store: Store) -> None:
    instance = uuid.uuid4()
    old = a_certificate(instance, 1, kind="AK", algorithm="ECC_P256")
    other = a_certificate(instance, 2)
    new = a_certificate(instance, 3, kind="AK", algorithm="ECC_P256", not_before=NOW + DAY)
    store.certificates.add([old, other])
    store.certificates.replace(instance, "AK", "ECC_P256", new)
    assert store.certificates.current(instance) == [new, other]
    assert store.certificates.history(instance)[0] == new
    assert dataclasses.replace(old, current=False) in store.certificates.history(instance)


def test_revocation_tells_what_it_changed(store: Store) -> None:
    instance, other = uuid.uuid4(), uuid.uuid4()
    store.certificates.add([a_certificate(instance, serial) for serial in (1, 2)] + [a_certificate(other, 3)])
    store.certificates.add([a_certificate(instance, 4, not_after=NOW - DAY)])
    first = store.certificates.revoke([1], "keyCompromise", NOW)
    assert [(item.serial, item.revoked_at, item.revocation_reason) for item in first] == [(1, NOW, "keyCompromise")]
    # The rest; what is revoked keeps its reason, what has expired needs none.
    assert [item.serial for item in store.certificates.revoke(instance, "superseded", NOW + DAY)] == [2]
    assert store.certificates.revoke([1, 2], "superseded", NOW) == []
    named = store.certificates.revoked(ISSUER, NOW)
    assert [(item.serial, item.revocation_reason) for item in named] == [(1, "keyCompromise"), (2, "superseded")]
    assert store.certificates.revoked(b"another", NOW) == []
    assert store.certificates.revoked(ISSUER, NOW + 20 * DAY) == []


def test_certificates_outlive_their_instance_revoked(store: Store) -> None:
    record = store.create(a_new_instance())
    store.certificates.add([a_certificate(record.id, 1)])
    store.delete(record.id, None)
    (left,) = store.certificates.history(record.id)
    assert left.revocation_reason == "cessationOfOperation"
    assert left.revoked_at is not None
    assert store.certificates.revoked(ISSUER, NOW) == [left]


def test_what_expires_next_comes_first(store: Store) -> None:
    instance = uuid.uuid4()
    days = {1: 5, 2: 1, 3: 3, 4: 2}
    store.certificates.add([a_certificate(instance, s, kind="AK", not_after=NOW + d * DAY) for s, d in days.items()])
    store.certificates.revoke([4], "superseded", NOW)
    soon = store.certificates.expiring("AK", NOW + 4 * DAY, 10)
    assert [item.serial for item in soon] == [2, 3]
    assert [item.serial for item in store.certificates.expiring("AK", NOW + 4 * DAY, 1)] == [2]
    assert store.certificates.expiring("EK", NOW + 100 * DAY, 10) == []


def test_the_expired_is_forgotten_but_for_what_is_in_force(store: Store) -> None:
    instance = uuid.uuid4()
    store.certificates.add([a_certificate(instance, 1), a_certificate(instance, 2, current=False)])
    assert store.certificates.forget_expired(NOW + 9 * DAY) == 0
    assert store.certificates.forget_expired(NOW + 11 * DAY) == 1
    assert [item.serial for item in store.certificates.history(instance)] == [1]


def test_crl_numbers_rise_over_restarts(store: Store) -> None:
    assert [store.certificates.next_crl_number() for _ in range(3)] == [1, 2, 3]


def test_many_are_revoked_at_once(store: Store) -> None:
    instance = uuid.uuid4()
    store.certificates.add([a_certificate(instance, serial) for serial in range(1, 1203)])
    assert len(store.certificates.revoke(instance, "keyCompromise", NOW)) == 1202
