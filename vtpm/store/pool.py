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
from vtpm.store.model import InstanceRecord, InstanceState, PoolClaim, PoolMember
from vtpm.store.rows import dump_platform, now, to_record, utc
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
    connection: sa.Connection, request_id: str, instance: uuid.UUID, fingerprint: bytes, moment: dt.datetime
) -> None:
    """Remember which instance a request_id has made; forget those that are too old."""
    connection.execute(sa.delete(requests).where(requests.c.created_at < moment - REQUEST_LIFETIME))
    row = {"id": uuid.UUID(request_id), "instance": instance, "fingerprint": fingerprint, "created_at": moment}
    connection.execute(sa.insert(requests), row)


class PoolTable:
    """Members of the pool, over the store's engines. Adding and discarding are the store's (vtpm.store.store)."""

    def __init__(self, url: str, read: sa.Engine, write: sa.Engine) -> None:
        self._url = url
        self._read_engine = read
        self._write_engine = write

    def members(self) -> Sequence[PoolMember]:
        """Return all members, the oldest first."""
        query = sa.select(pool).order_by(pool.c.created_at, pool.c.instance)
        with database.errors(self._url), self._read_engine.begin() as connection:
            return [PoolMember(row.instance, row.key, utc(row.created_at)) for row in connection.execute(query)]

    def record(self, instance: uuid.UUID) -> InstanceRecord:
        """Return a member as the instance that it could be: for what is done to it before it is one."""
        with database.errors(self._url), self._read_engine.begin() as connection:
            row = connection.execute(sa.select(instances).where(instances.c.id == instance)).one()
        return to_record(row, {}, InstanceState.OFF)

    @staticmethod
    def add_row(connection: sa.Connection, instance: uuid.UUID, key: str, moment: dt.datetime) -> PoolMember:
        """Note a member inside a transaction of the caller's."""
        connection.execute(sa.insert(pool), {"instance": instance, "key": key, "created_at": moment})
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
                if not self.remove_row(connection, claim.id):
                    raise _gone()
                changed = sa.update(instances).where(instances.c.id == claim.id, instances.c.state == POOLED)
                if connection.execute(changed.values(values)).rowcount != 1:
                    raise _gone()
                self._replace(connection, claim)
                rows = [{"instance": claim.id, "key": key, "value": value} for key, value in claim.labels.items()]
                if rows:
                    connection.execute(sa.insert(labels), rows)
                if claim.request_id:
                    insert_request(connection, claim.request_id, claim.id, claim.fingerprint, moment)
                row = connection.execute(sa.select(instances).where(instances.c.id == claim.id)).one()
                crash_point("claim.before_commit")
        except IntegrityError as error:
            raise taken(error, name) from None
        crash_point("claim.after_commit")
        return to_record(row, _sorted(claim.labels))

    @staticmethod
    def _replace(connection: sa.Connection, claim: PoolClaim) -> None:
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
            Certificates.revoke_rows(connection, same, "superseded", now())
            connection.execute(sa.update(certificates).where(same).values(current=False))
            Certificates.add_rows(connection, [record])


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
