"""The pool: manufactured, certified TPMs that are nobody's yet, kept as rows of `instances` in the state POOLED.

Each becomes one instance, once: the transaction that gives it a name takes its row out of the pool.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from vtpm.crashpoints import crash_point
from vtpm.errors import AlreadyExistsError, ConflictError
from vtpm.seal.envelope import StateKind
from vtpm.store import database
from vtpm.store.certificates import Certificates
from vtpm.store.macs import INSTANCES, POOL, REQUESTS, RowMacs
from vtpm.store.model import InstanceRecord, InstanceState, PoolClaim, PoolMember
from vtpm.store.rows import dump_platform, moment_of, now, to_record, utc
from vtpm.store.schema import certificates, instances, labels, pool, requests, states

POOLED: Final = "POOLED"
REQUEST_LIFETIME: Final = dt.timedelta(hours=24)


def pool_name(instance: uuid.UUID) -> str:
    """Return what stands in the column `name`, which is unique, and is no name that an instance can have."""
    return f"@{instance}"


def default_name(instance: uuid.UUID) -> str:
    """Return the name of an instance that was created without one."""
    return f"vtpm-{instance.hex[:12]}"


def taken(error: IntegrityError, name: str) -> AlreadyExistsError:
    """Return what a violated uniqueness means to who creates an instance."""
    if "requests.id" in str(error.orig):
        return AlreadyExistsError(
            "REQUEST_ID_TAKEN", "a creation under this request_id was faster", remedy="send the same request again"
        )
    return AlreadyExistsError(
        "INSTANCE_NAME_TAKEN",
        "an instance of this name exists",
        subject=name,
        remedy="choose another name, or delete that one",
    )


def insert_request(
    connection: sa.Connection,
    macs: RowMacs,
    request_id: str,
    instance: uuid.UUID,
    fingerprint: bytes,
    moment: dt.datetime,
) -> None:
    """Remember which instance a request_id has made; forget those that are too old."""
    connection.execute(sa.delete(requests).where(requests.c.created_at < moment - REQUEST_LIFETIME))
    row = {"id": uuid.UUID(request_id), "instance": instance, "fingerprint": fingerprint, "created_at": moment}
    connection.execute(sa.insert(requests), macs.signed(REQUESTS, row))


class PoolTable:
    """Members of the pool, over the store's engines. Adding and discarding are the store's (vtpm.store.store)."""

    def __init__(self, url: str, read: sa.Engine, write: sa.Engine, macs: RowMacs, recorded: Certificates) -> None:
        self._url = url
        self._macs = macs
        self._certificates = recorded
        self._read_engine = read
        self._write_engine = write

    def members(self) -> Sequence[PoolMember]:
        """Return all members, the oldest first. One whose row is not as it was written is left where it is."""
        query = POOL.select().order_by(pool.c.created_at, pool.c.instance)
        with database.errors(self._url), self._read_engine.begin() as connection:
            rows = [row for row in connection.execute(query) if self._macs.is_right(POOL, row)]
        return [PoolMember(uuid.UUID(row.instance), row.key, moment_of(row.created_at)) for row in rows]

    def record(self, instance: uuid.UUID) -> InstanceRecord:
        """Return a member as the instance that it could be: for what is done to it before it is one.

        Raises:
            SealedStateError: ROW_MAC_MISMATCH.
        """
        with database.errors(self._url), self._read_engine.begin() as connection:
            row = connection.execute(INSTANCES.select().where(instances.c.id == instance)).one()
        return to_record(self._macs.check(INSTANCES, row), {}, InstanceState.OFF)

    def add_row(self, connection: sa.Connection, instance: uuid.UUID, key: str, moment: dt.datetime) -> PoolMember:
        """Note a member inside a transaction of the caller's."""
        row = {"instance": instance, "key": key, "created_at": moment}
        connection.execute(sa.insert(pool), self._macs.signed(POOL, row))
        return PoolMember(instance, key, utc(moment))

    @staticmethod
    def remove_row(connection: sa.Connection, instance: uuid.UUID) -> bool:
        """Take a member out inside a transaction of the caller's; return whether it was there."""
        return connection.execute(sa.delete(pool).where(pool.c.instance == instance)).rowcount == 1

    def claim(self, claim: PoolClaim) -> InstanceRecord:
        """Make a member an instance, OFF, in one transaction.

        Raises:
            ConflictError: POOL_MEMBER_GONE, it is not in the pool any more, or its state is not the one that was changed.
            AlreadyExistsError: INSTANCE_NAME_TAKEN or REQUEST_ID_TAKEN; it stays in the pool.
            SealedStateError: ROW_MAC_MISMATCH.
        """
        moment = now()
        name = claim.name or default_name(claim.id)
        values = {
            "name": name,
            "state": InstanceState.OFF.value,
            "platform": dump_platform(claim.platform),
            "created_at": moment,
            "updated_at": moment,
        }
        try:
            with database.errors(self._url), self._write_engine.begin() as connection:
                member = connection.execute(POOL.select().where(pool.c.instance == claim.id)).first()
                if member is None:
                    raise _gone()
                self._macs.check(POOL, member)
                self.remove_row(connection, claim.id)
                row = connection.execute(INSTANCES.select().where(instances.c.id == claim.id)).first()
                if row is None or self._macs.check(INSTANCES, row).state != POOLED:
                    raise _gone()
                self._macs.change(connection, INSTANCES, row, values)
                self._replace(connection, claim)
                rows = [{"instance": claim.id, "key": key, "value": value} for key, value in claim.labels.items()]
                if rows:
                    connection.execute(sa.insert(labels), rows)
                if claim.request_id:
                    insert_request(connection, self._macs, claim.request_id, claim.id, claim.fingerprint, moment)
                row = connection.execute(INSTANCES.select().where(instances.c.id == claim.id)).one()
                crash_point("claim.before_commit")
        except IntegrityError as error:
            raise taken(error, name) from None
        crash_point("claim.after_commit")
        return to_record(row, _sorted(claim.labels))

    def _replace(self, connection: sa.Connection, claim: PoolClaim) -> None:
        """Put what was made for this claim in the place of what the pool had."""
        if claim.state is not None:
            replace_state(connection, claim.id, claim.state.epoch, claim.state.version, claim.state.blob)
        for record in claim.certificates:
            same = sa.and_(
                certificates.c.instance == claim.id,
                certificates.c.kind == record.kind,
                certificates.c.algorithm == record.algorithm,
                certificates.c.current,
            )
            # The old one never left this host.
            self._certificates.revoke_rows(connection, same, "superseded", now())
            self._certificates.retire_rows(connection, claim.id, record.kind, record.algorithm)
            self._certificates.add_rows(connection, [record])


def replace_state(connection: sa.Connection, instance: uuid.UUID, epoch: int, version: int, blob: bytes) -> None:
    """Put a sealed permanent state of a TPM that does not run in the place of the version before it.

    Raises:
        ConflictError: POOL_MEMBER_GONE or STATE_CHANGED.
    """
    query = sa.update(states).where(
        states.c.instance == instance,
        states.c.kind == int(StateKind.PERMANENT),
        states.c.epoch == epoch,
        states.c.version == version - 1,
    )
    if connection.execute(query.values(version=version, blob=blob)).rowcount != 1:
        raise ConflictError("STATE_CHANGED", "the TPM's state was changed meanwhile", subject=str(instance), remedy="try again")


def _gone() -> ConflictError:
    return ConflictError("POOL_MEMBER_GONE", "the pooled TPM is not there any more", remedy="try again")


def _sorted(values: Mapping[str, str]) -> dict[str, str]:
    return dict(sorted(values.items()))
