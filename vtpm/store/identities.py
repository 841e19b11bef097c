"""What becomes of certified keys: AK certificates renewed, keys that their guest has ended. Synchronous and thread-safe."""

from __future__ import annotations

import contextlib
import datetime as dt
import uuid
from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa

from vtpm.crashpoints import crash_point
from vtpm.errors import ConflictError
from vtpm.store import database
from vtpm.store.certificates import Certificates
from vtpm.store.macs import INSTANCES, RowMacs, mismatch
from vtpm.store.model import CertificateRecord, IdentityState, InstanceState, KeyRecord, SealedState
from vtpm.store.pool import replace_state
from vtpm.store.rows import dump_keys, now
from vtpm.store.schema import certificates, instances

_OFF_STATES: Final = (InstanceState.OFF.value, InstanceState.FAILED.value)


class Identities:
    """Over the store's engines."""

    def __init__(self, url: str, read: sa.Engine, write: sa.Engine, macs: RowMacs, recorded: Certificates) -> None:
        self._url = url
        self._macs = macs
        self._certificates = recorded
        self._read_engine = read
        self._write_engine = write

    def overdue(self, kind: str, before: dt.datetime, limit: int) -> list[uuid.UUID]:
        """Return up to `limit` instances that are ON and have a certificate of `kind` in force that ends before `before`.

        Whom to look at, no more than that: the rows are believed when they are read by themselves.
        """
        query = (
            sa.select(sa.type_coerce(certificates.c.instance, sa.types.NullType()))
            .join(instances, instances.c.id == certificates.c.instance)
            .where(
                instances.c.state == InstanceState.ON.value,
                certificates.c.kind == kind,
                certificates.c.current,
                certificates.c.revoked_at.is_(None),
                certificates.c.not_after < before.astimezone(dt.UTC).replace(tzinfo=None),
            )
            .order_by(certificates.c.not_after)
            .limit(limit)
        )
        with database.errors(self._url), self._read_engine.begin() as connection:
            found = dict.fromkeys(connection.execute(query).scalars())
        instances_due = []
        for text in found:
            # A row that something else has written may hold anything.
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                instances_due.append(uuid.UUID(text))
        return instances_due

    def put_in_force(self, record: CertificateRecord) -> None:
        """Put a certificate that is recorded already in force, in the place of what certifies the same key."""
        with database.errors(self._url), self._write_engine.begin() as connection:
            self._certificates.put_row_in_force(connection, record)

    def renew_off(self, instance: uuid.UUID, state: SealedState, records: Sequence[CertificateRecord]) -> None:
        """Record certificates and put them in force together with the state that has them in its NV; the instance does not run.

        Raises:
            ConflictError: INSTANCE_CHANGED or STATE_CHANGED; nothing was changed.
        """
        with database.errors(self._url), self._write_engine.begin() as connection:
            row = connection.execute(INSTANCES.select().where(instances.c.id == instance)).first()
            if row is None or self._macs.check(INSTANCES, row).state not in _OFF_STATES:
                raise ConflictError("INSTANCE_CHANGED", "the instance is not OFF any more", subject=str(instance))
            replace_state(connection, instance, state.epoch, state.version, state.blob)
            for record in records:
                self._certificates.retire_rows(connection, record.instance, record.kind, record.algorithm)
            self._certificates.add_rows(connection, records)
            crash_point("renew.before_commit")

    def change(
        self, instance: uuid.UUID, keys: Sequence[KeyRecord], identity: IdentityState, gone: Sequence[int], reason: str
    ) -> None:
        """Write down an instance's keys and what they are worth, and revoke the certificates `gone`, in one step.

        Raises:
            SealedStateError: ROW_MAC_MISMATCH; the certificates are revoked all the same.
        """
        moment = now()
        with database.errors(self._url), self._write_engine.begin() as connection:
            row = connection.execute(INSTANCES.select().where(instances.c.id == instance)).first()
            right = row is not None and self._macs.is_right(INSTANCES, row)
            if row is not None and right:
                values: dict[str, Any] = {
                    "keys": dump_keys(tuple(keys)),
                    "identity": identity.value,
                    "revision": row.revision + 1,
                    "updated_at": moment,
                }
                self._macs.change(connection, INSTANCES, row, values)
            serials = certificates.c.serial.in_([f"{serial:040x}" for serial in gone])
            if gone:
                self._certificates.revoke_rows(connection, serials, reason, moment)
            crash_point("identity.before_commit")
        if row is not None and not right:
            raise mismatch("instances", str(instance))
