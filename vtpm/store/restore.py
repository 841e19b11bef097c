"""One instance out of a backup's store, and into a store in use. What is sealed and wrapped stays so."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from vtpm.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from vtpm.seal.envelope import StateKind
from vtpm.seal.keys import WrappedKey
from vtpm.store import database
from vtpm.store.freshness import FreshnessLog, LogKind
from vtpm.store.macs import INSTANCES, RowMacs
from vtpm.store.model import InstanceState, SealedState
from vtpm.store.rows import check_written, now
from vtpm.store.schema import data_keys, instances, labels, snapshot_uses, snapshots, states

# What a restored instance's ownership epoch rises by. The copy that the backup was made of may have gone on: none of its epochs
# must ever be one of the restored instance's.
EPOCH_LEAP: Final = 1_000_000

_INSTANCE: Final = """
SELECT i.id, i.name, i.profile, i.keys, i.engine, i.epoch, d.provider, d.key_id, d.blob, s.epoch, s.version, s.blob
FROM instances i JOIN data_keys d ON d.instance = i.id JOIN states s ON s.instance = i.id AND s.kind = ?
WHERE i.state != 'DELETING' AND (i.name = ? OR i.id = ?)
"""


@dataclass(frozen=True, slots=True)
class BackedUpInstance:
    """An instance as a backup has it; `profile` and `keys` as vtpm.store.rows writes them down."""

    id: uuid.UUID
    name: str
    labels: Mapping[str, str]
    profile: str
    keys: str
    engine: str
    owner_epoch: int
    wrapped_key: WrappedKey
    state: SealedState = field(repr=False)


def find(connection: sqlite3.Connection, ref: str, subject: str) -> BackedUpInstance:
    """Return the instance that `ref` (name or id) names in a backup's store.

    Raises:
        NotFoundError: INSTANCE_NOT_FOUND.
    """
    try:
        hexadecimal = uuid.UUID(ref.removeprefix("instances/")).hex
    except ValueError:
        hexadecimal = ""
    row = connection.execute(_INSTANCE, (int(StateKind.PERMANENT), ref, hexadecimal)).fetchone()
    if row is None:
        raise NotFoundError(
            "INSTANCE_NOT_FOUND", f"the backup {subject} has no such instance", subject=ref[:80], remedy="vtpm backup verify"
        )
    query = "SELECT key, value FROM labels WHERE instance = ?"
    return BackedUpInstance(
        uuid.UUID(row[0]),
        row[1],
        dict(connection.execute(query, (row[0],))),
        row[2],
        row[3],
        row[4],
        row[5],
        WrappedKey(row[6], row[7], row[8]),
        SealedState(row[9], row[10], row[11]),
    )


class InstanceRestore:
    """Puts instances of backups into a store."""

    def __init__(self, url: str, write: sa.Engine, log: FreshnessLog, macs: RowMacs) -> None:
        self._url = url
        self._macs = macs
        self._write_engine = write
        self._log = log

    def leap(self) -> None:
        """Make this a store that was restored: what was ON is OFF, and every epoch is above all that were before."""
        with database.errors(self._url), self._write_engine.begin() as connection:
            for row in connection.execute(INSTANCES.select()).all():
                if self._macs.is_right(INSTANCES, row):
                    off = {"state": InstanceState.OFF.value, "boot_id": ""} if row.state == InstanceState.ON.value else {}
                    changes = {"epoch": row.epoch + EPOCH_LEAP, "revision": row.revision + 1, **off}
                    self._macs.change(connection, INSTANCES, row, changes)

    def put(self, item: BackedUpInstance) -> None:
        """Replace the instance of that id by what the backup has, or add it; it is OFF.

        Raises:
            FailedPreconditionError: INSTANCE_ON.
            AlreadyExistsError: INSTANCE_NAME_TAKEN, by another instance.
            InvalidArgumentError: BACKUP_ROW_INVALID.
        """
        try:
            check_written(item.profile, item.keys)
        except (ValueError, TypeError):
            raise InvalidArgumentError(
                "BACKUP_ROW_INVALID", "the backup's row can't be read", subject=item.name, remedy="vtpm backup verify"
            ) from None
        try:
            with database.errors(self._url), self._write_engine.begin() as connection:
                self._put(connection, item)
        except IntegrityError:
            raise AlreadyExistsError(
                "INSTANCE_NAME_TAKEN",
                "another instance has this name",
                subject=item.name,
                remedy="restore under another name: --name",
            ) from None

    def _put(self, connection: sa.Connection, item: BackedUpInstance) -> None:
        present = connection.execute(INSTANCES.select().where(instances.c.id == item.id)).first()
        # A row that is not as it was written says nothing; putting the instance back is what mends it.
        believed = present if present is not None and self._macs.is_right(INSTANCES, present) else None
        if believed is not None and believed.state not in (InstanceState.OFF, InstanceState.FAILED):
            raise FailedPreconditionError(
                "INSTANCE_ON",
                f"the instance is {believed.state}",
                subject=item.name,
                remedy=f"vtpm instance stop {item.name}",
            )
        moment = now()
        values = {
            "name": item.name,
            "state": InstanceState.OFF.value,
            "failure": "",
            "profile": item.profile,
            "keys": item.keys,
            "engine": item.engine,
            "epoch": max(item.owner_epoch, believed.epoch if believed else 0) + EPOCH_LEAP,
            "boot_id": "",
            "updated_at": moment,
        }
        added = {"id": item.id, "revision": 1, "created_at": moment, "platform": "", "identity": "UNCERTIFIED", **values}
        if present is None:
            connection.execute(sa.insert(instances), self._macs.signed(INSTANCES, added))
        else:
            # Volatile states go too: they belong to what is replaced (invariant 2).
            for table in (snapshot_uses, snapshots, states, data_keys, labels):
                connection.execute(sa.delete(table).where(table.c.instance == item.id))
            if believed is not None:
                self._macs.change(connection, INSTANCES, believed, {**values, "revision": believed.revision + 1})
            else:
                changed = sa.update(instances).where(instances.c.id == item.id)
                connection.execute(changed.values(self._macs.signed(INSTANCES, added)))
        rows = [{"instance": item.id, "key": key, "value": value} for key, value in item.labels.items()]
        if rows:
            connection.execute(sa.insert(labels), rows)
        key, state = item.wrapped_key, item.state
        connection.execute(
            sa.insert(data_keys), {"instance": item.id, "provider": key.provider, "key_id": key.key_id, "blob": key.blob}
        )
        connection.execute(
            sa.insert(states),
            {
                "instance": item.id,
                "kind": int(StateKind.PERMANENT),
                "epoch": state.epoch,
                "version": state.version,
                "blob": state.blob,
            },
        )
        self._log.record(connection, LogKind.ACCEPTED, item.id)
