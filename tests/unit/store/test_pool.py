"""The pool in the store: out of it once, and into nobody's sight before; and renewals that go with a state."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.store.given import a_commit, a_new_instance, database_file
from vtpm.errors import AlreadyExistsError, ConflictError, NotFoundError, SealedStateError, VtpmError
from vtpm.store.model import (
    CertificateRecord,
    Filter,
    IdentityState,
    InstanceRecord,
    InstanceState,
    PlatformRecord,
    PoolClaim,
    PoolMember,
    SealedState,
)
from vtpm.store.store import Store

PLATFORM = PlatformRecord("Maker", "Model", "1")
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def a_certificate(instance: uuid.UUID, serial: int, kind: str = "PLATFORM", **changes: object) -> CertificateRecord:
    record = CertificateRecord(serial, instance, kind, "", b"der", NOW, NOW + dt.timedelta(days=1), b"issuer")
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def a_member(store: Store, key: str = "key") -> PoolMember:
    new = a_new_instance("")
    certificates = (a_certificate(new.id, int(new.id)),)
    return store.add_to_pool(dataclasses.replace(new, certificates=certificates, identity=IdentityState.CERTIFIED), key)


def a_claim(member: PoolMember, name: str = "web-1", **changes: object) -> PoolClaim:
    claim = PoolClaim(member.id, name, {"team": "web"}, PLATFORM)
    return dataclasses.replace(claim, **changes)  # type: ignore[arg-type]


def test_a_member_is_no_instance_until_it_is_claimed(store: Store) -> None:
    member = a_member(store)
    assert [found.id for found in store.pool.members()] == [member.id]
    assert store.list(Filter(), 10, None) == []
    assert not any(store.counts().values())
    with pytest.raises(NotFoundError):
        store.get(str(member.id))
    with pytest.raises(NotFoundError):
        store.acquire(member.id, boot_id="boot")
    record = store.pool.claim(a_claim(member))
    assert record == store.get("web-1")
    assert (record.id, record.state, record.platform, record.labels) == (
        member.id,
        InstanceState.OFF,
        PLATFORM,
        {"team": "web"},
    )
    assert record.identity is IdentityState.CERTIFIED
    assert store.pool.members() == []


def test_of_two_claims_one_is_made(store: Store) -> None:
    member = a_member(store)

    def claim(number: int) -> InstanceRecord | str:
        try:
            return store.pool.claim(a_claim(member, f"web-{number}"))
        except VtpmError as error:
            return error.reason

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(claim, range(8)))
    made = [result for result in results if isinstance(result, InstanceRecord)]
    assert len(made) == 1
    assert [result for result in results if isinstance(result, str)] == ["POOL_MEMBER_GONE"] * 7
    assert [record.id for record in store.list(Filter(), 10, None)] == [member.id]


def test_a_taken_name_leaves_the_member(store: Store) -> None:
    store.create(a_new_instance("web-1"))
    member = a_member(store)
    with pytest.raises(AlreadyExistsError) as raised:
        store.pool.claim(a_claim(member))
    assert raised.value.reason == "INSTANCE_NAME_TAKEN"
    assert [found.id for found in store.pool.members()] == [member.id]


def test_a_claim_under_a_request_id_is_found_again(store: Store) -> None:
    member = a_member(store)
    request_id = str(uuid.uuid4())
    store.pool.claim(a_claim(member, request_id=request_id, fingerprint=b"print"))
    assert store.find_request(request_id) == (member.id, b"print")


def test_a_claim_brings_its_state_and_certificates(store: Store) -> None:
    member = a_member(store)
    mine = a_certificate(member.id, 99)
    store.pool.claim(a_claim(member, state=SealedState(0, 2, b"rewritten"), certificates=(mine,)))
    assert store.load(member.id)[1] == SealedState(0, 2, b"rewritten")
    assert [item.serial for item in store.certificates.current(member.id)] == [99]
    (old,) = (item for item in store.certificates.history(member.id) if item.serial != 99)
    assert old.revocation_reason == "superseded"


def test_a_claim_on_a_state_that_is_another_changes_nothing(store: Store) -> None:
    member = a_member(store)
    with pytest.raises(ConflictError) as raised:
        store.pool.claim(a_claim(member, state=SealedState(0, 3, b"rewritten")))
    assert raised.value.reason == "STATE_CHANGED"
    assert [found.id for found in store.pool.members()] == [member.id]


def test_a_discarded_member_is_gone_and_its_certificates_are_revoked(store: Store) -> None:
    member = a_member(store)
    store.discard_from_pool([member.id, uuid.uuid4()])
    assert store.pool.members() == []
    with pytest.raises(NotFoundError):
        store.load(member.id)
    (record,) = store.certificates.history(member.id)
    assert record.revocation_reason == "cessationOfOperation"


def test_an_instance_is_never_discarded(store: Store) -> None:
    member = a_member(store)
    store.pool.claim(a_claim(member))
    store.discard_from_pool([member.id])
    assert store.get("web-1").id == member.id
    assert store.load(member.id)[1].blob


def test_renewals_of_what_runs_are_found_and_of_what_does_not_are_not(store: Store) -> None:
    instances = [store.create(a_new_instance(f"web-{number}")).id for number in range(3)]
    store.certificates.add([a_certificate(instance, int(instance), "AK", algorithm="ECC_P256") for instance in instances])
    store.acquire(instances[1], boot_id="boot")
    assert store.identities.overdue("AK", NOW + dt.timedelta(days=2), 10) == [instances[1]]
    assert store.identities.overdue("AK", NOW + dt.timedelta(hours=1), 10) == []
    with pytest.raises(ConflictError) as raised:
        store.identities.renew_off(instances[1], SealedState(0, 2, b"state"), ())
    assert raised.value.reason == "INSTANCE_CHANGED"
    store.identities.renew_off(instances[0], SealedState(0, 2, b"state"), (a_certificate(instances[0], 5, "AK"),))
    assert store.load(instances[0])[1] == SealedState(0, 2, b"state")


def test_a_member_that_was_used_is_nobody_else_s_tpm(store: Store, path: Path) -> None:
    """Its rows, put back as they were in the pool, have right MACs; its state is of an epoch that they do not know."""
    member = a_member(store)
    with database_file(path) as database:
        before = {table: database.execute(f"SELECT * FROM {table}").fetchone() for table in ("pool", "instances")}
    owner = store.pool.claim(a_claim(member, "owner"))
    owner = store.acquire(owner.id, boot_id="boot-1")
    assert store.commit([a_commit(owner, 2)]) == [""]
    with database_file(path) as database:
        for table, row in before.items():
            database.execute("DELETE FROM labels")
            database.execute(f"REPLACE INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    other = store.pool.claim(a_claim(member, "other"))
    with pytest.raises(SealedStateError) as refused:
        store.acquire(other.id, boot_id="boot-1")
    assert refused.value.reason == "EPOCH_SET_BACK"
