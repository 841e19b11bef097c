"""The store: instances, their wrapped data keys and sealed states. Synchronous and thread-safe; every change is durable on
return."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError

from vtpm.crashpoints import crash_point
from vtpm.errors import ConflictError, FailedPreconditionError, NotFoundError, SealedStateError, StoreError
from vtpm.seal.envelope import StateKind
from vtpm.seal.keys import WrappedKey
from vtpm.store import database
from vtpm.store.adoption import sign_all
from vtpm.store.authorities import Authorities
from vtpm.store.certificates import Certificates
from vtpm.store.commits import AnyCommit, StateCommits
from vtpm.store.freshness import FreshnessLog, LogKind
from vtpm.store.identities import Identities
from vtpm.store.macs import INSTANCES, REQUESTS, RowMacs, mismatch
from vtpm.store.model import (
    Failure,
    Filter,
    InstanceRecord,
    InstanceState,
    KeyRecord,
    NewInstance,
    PoolMember,
    SealedState,
)
from vtpm.store.pool import POOLED, REQUEST_LIFETIME, PoolTable, insert_request, pool_name, taken
from vtpm.store.restore import InstanceRestore
from vtpm.store.rows import (
    dump_failure,
    dump_keys,
    dump_platform,
    dump_profile,
    is_refused,
    now,
    refused_record,
    to_record,
)
from vtpm.store.schema import (
    authority_keys,
    certificates,
    data_keys,
    instances,
    labels,
    requests,
    snapshot_uses,
    snapshots,
    states,
)
from vtpm.store.snapshots import SnapshotReader

log: Final = structlog.get_logger("vtpm.store")

_DELETING: Final = "DELETING"
# No instances: those that are gone but for their traces, and TPMs without an owner yet.
_HIDDEN: Final = (_DELETING, POOLED)


class Store:
    """A store in a SQLite database."""

    def __init__(self, url: str, read: sa.Engine, write: sa.Engine) -> None:
        self._url = url
        self._read_engine = read
        self._write_engine = write
        path = sa.make_url(url).database or ""
        # They have no key yet (vtpm.store.adoption).
        self.macs = RowMacs()
        self._commits = StateCommits(path, url, self.macs)
        self.snapshots = SnapshotReader(path, url, self.macs)
        self.freshness = FreshnessLog(path, url, self.macs)
        self.restores = InstanceRestore(url, write, self.freshness, self.macs)
        self.certificates = Certificates(url, read, write, self.macs)
        self.authorities = Authorities(url, read, write, self.macs)
        self.pool = PoolTable(url, read, write, self.macs, self.certificates)
        self.identities = Identities(url, read, write, self.macs, self.certificates)

    @classmethod
    def open(cls, url: str) -> Store:
        """Open the database at `url` (`sqlite:////absolute/path`), make or migrate its schema, finish interrupted deletions.

        Raises:
            StoreError: it can't be used; nothing was changed.
        """
        with database.errors(url):
            read, write = database.connect(url)
            try:
                database.migrate(read, write, url)
                store = cls(url, read, write)
                try:
                    store._finish_deletions()
                except StoreError as error:
                    if error.reason != "ERASURE_PENDING":
                        raise
                    log.warning("store.erasure_pending", remedy=error.remedy)
                store._commits.make_room()
            except BaseException:
                read.dispose()
                raise
        return store

    def close(self) -> None:
        """Close every connection."""
        self._commits.close()
        self.snapshots.close()
        self.freshness.close()
        self._read_engine.dispose()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with database.errors(self._url), self._read_engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with database.errors(self._url), self._write_engine.begin() as connection:
            yield connection

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def is_empty(self) -> bool:
        """Whether nothing was ever sealed into this store and kept."""
        with self._reading() as connection:
            keys = (sa.select(sa.literal(1)).select_from(table).limit(1) for table in (data_keys, authority_keys))
            return all(connection.execute(query).first() is None for query in keys)

    def get(self, ref: str) -> InstanceRecord:
        """Return the instance that `ref` names: `instances/…`, id or name.

        Raises:
            NotFoundError: INSTANCE_NOT_FOUND.
        """
        with self._reading() as connection:
            return self._get(connection, ref)

    def _get(self, connection: sa.Connection, ref: str) -> InstanceRecord:
        text = ref.removeprefix("instances/")
        condition = instances.c.name == text
        with contextlib.suppress(ValueError):
            condition = instances.c.id == uuid.UUID(text)
        found = self._select(connection, condition)
        if not found:
            raise NotFoundError(
                "INSTANCE_NOT_FOUND", "there is no such instance", subject=text[:80], remedy="vtpm instance list"
            )
        return found[0]

    def _by_id(self, connection: sa.Connection, instance: uuid.UUID) -> InstanceRecord:
        return self._get(connection, str(instance))

    def _select(self, connection: sa.Connection, *conditions: Any, limit: int | None = None) -> list[InstanceRecord]:
        query = INSTANCES.select().where(instances.c.state.not_in(_HIDDEN), *conditions).order_by(instances.c.id).limit(limit)
        rows = connection.execute(query).all()
        found: dict[str, dict[str, str]] = {row.id: {} for row in rows}
        ids = list(found)
        owner = sa.type_coerce(labels.c.instance, sa.types.NullType())
        for start in range(0, len(ids), 500):
            part = sa.select(owner.label("instance"), labels.c.key, labels.c.value)
            part = part.where(owner.in_(ids[start : start + 500])).order_by(labels.c.key)
            for label in connection.execute(part):
                # They carry no MAC, and an answer that lists others too could not take what is no text.
                if isinstance(label.key, str) and isinstance(label.value, str):
                    found[label.instance][label.key] = label.value
        records = [self._record(row, found[row.id]) for row in rows]
        return [record for record in records if record is not None]

    def _record(self, row: Any, its_labels: Mapping[str, str]) -> InstanceRecord | None:
        """Invariant 9: what decides is what the service wrote; another row is shown as FAILED, and nothing in it counts."""
        if self.macs.is_right(INSTANCES, row):
            return to_record(row, its_labels)
        return refused_record(row, its_labels)

    def list(self, wanted: Filter, page_size: int, after: uuid.UUID | None) -> list[InstanceRecord]:
        """Return up to `page_size` instances that match, ordered by id, from behind `after`."""
        conditions: list[Any] = []
        if after is not None:
            conditions.append(instances.c.id > after)
        if wanted.state is not None:
            conditions.append(instances.c.state == wanted.state.value)
        if wanted.name is not None:
            conditions.append(instances.c.name == wanted.name)
        if wanted.name_prefix is not None:
            # Not LIKE, which takes upper and lower case for the same in SQLite.
            prefix = wanted.name_prefix
            conditions.append(sa.func.substr(instances.c.name, 1, len(prefix)) == prefix)
        for key, value in wanted.labels.items():
            match = sa.select(labels.c.instance).where(labels.c.key == key, labels.c.value == value)
            conditions.append(instances.c.id.in_(match))
        with self._reading() as connection:
            return self._select(connection, *conditions, limit=page_size)

    def owned(self) -> Sequence[InstanceRecord]:
        """Return the instances that are ON."""
        with self._reading() as connection:
            found = self._select(connection, instances.c.state == InstanceState.ON.value)
        return [record for record in found if record.state is InstanceState.ON]

    def counts(self) -> Mapping[InstanceState, int]:
        """Return how many instances are in each state."""
        query = (
            sa.select(instances.c.state, sa.func.count()).where(instances.c.state.not_in(_HIDDEN)).group_by(instances.c.state)
        )
        found: dict[InstanceState, int] = {}
        with self._reading() as connection:
            for state, count in connection.execute(query):
                # What is no state was not written by the service, and is shown as FAILED.
                known = InstanceState(state) if state in list(InstanceState) else InstanceState.FAILED
                found[known] = found.get(known, 0) + count
        return found

    def find_request(self, request_id: str) -> tuple[uuid.UUID, bytes] | None:
        """Return (instance, fingerprint) of an earlier creation under `request_id`; kept for 24 hours.

        Raises:
            SealedStateError: ROW_MAC_MISMATCH.
        """
        query = REQUESTS.select().where(
            requests.c.id == uuid.UUID(request_id), requests.c.created_at >= now() - REQUEST_LIFETIME
        )
        with self._reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        self.macs.check(REQUESTS, row, request_id)
        return uuid.UUID(row.instance), row.fingerprint

    def load(self, instance: uuid.UUID) -> tuple[WrappedKey, SealedState]:
        """Return the wrapped data key and the sealed permanent state.

        Raises:
            NotFoundError: INSTANCE_NOT_FOUND.
        """
        query = (
            sa.select(data_keys.c.provider, data_keys.c.key_id, data_keys.c.blob.label("key"), states)
            .join(states, states.c.instance == data_keys.c.instance)
            .where(data_keys.c.instance == instance, states.c.kind == int(StateKind.PERMANENT))
        )
        with self._reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFoundError("INSTANCE_NOT_FOUND", "there is no sealed state of this instance", subject=str(instance))
        return WrappedKey(row.provider, row.key_id, row.key), SealedState(row.epoch, row.version, row.blob)

    # ---- writing ---------------------------------------------------------------------------------------------------------

    def create(self, new: NewInstance) -> InstanceRecord:
        """Add a manufactured instance, OFF, with its key and state, in one transaction.

        Raises:
            AlreadyExistsError: INSTANCE_NAME_TAKEN or REQUEST_ID_TAKEN.
        """
        moment = now()
        try:
            with self._writing() as connection:
                self._insert(connection, new, new.name, InstanceState.OFF.value, moment)
                self._insert_labels(connection, new.id, new.labels)
                if new.request_id:
                    insert_request(connection, self.macs, new.request_id, new.id, new.fingerprint, moment)
                crash_point("create.before_commit")
        except IntegrityError as error:
            raise taken(error, new.name) from None
        crash_point("create.after_commit")
        return self.get(str(new.id))

    def add_to_pool(self, new: NewInstance, key: str) -> PoolMember:
        """Add a manufactured TPM that is nobody's yet; `key` says what it is good for. It has no name and no labels."""
        moment = now()
        with self._writing() as connection:
            self._insert(connection, new, pool_name(new.id), POOLED, moment)
            member = self.pool.add_row(connection, new.id, key, moment)
            crash_point("pool.before_add")
        return member

    def discard_from_pool(self, members: Sequence[uuid.UUID]) -> None:
        """Destroy TPMs of the pool for good: their data keys first (crypto-erase); their certificates are revoked.

        Raises:
            StoreError: ERASURE_PENDING.
        """
        with self._writing() as connection:
            for instance in members:
                if self.pool.remove_row(connection, instance):
                    query = sa.update(instances).where(instances.c.id == instance, instances.c.state == POOLED)
                    connection.execute(query.values(state=_DELETING))
                    connection.execute(sa.delete(data_keys).where(data_keys.c.instance == instance))
                    self.freshness.record(connection, LogKind.DELETED, instance)
                    mine = certificates.c.instance == instance
                    self.certificates.revoke_rows(connection, mine, "cessationOfOperation", now())
            crash_point("pool.before_discard")
        self._finish_deletions()

    def _insert(self, connection: sa.Connection, new: NewInstance, name: str, state: str, moment: dt.datetime) -> None:
        row = {
            "id": new.id,
            "name": name,
            "state": state,
            "failure": "",
            "profile": dump_profile(new.profile),
            "keys": dump_keys(new.keys),
            "engine": new.engine,
            "epoch": 0,
            "boot_id": "",
            "revision": 1,
            "created_at": moment,
            "updated_at": moment,
            "platform": dump_platform(new.platform),
            "identity": new.identity.value,
        }
        connection.execute(sa.insert(instances), self.macs.signed(INSTANCES, row))
        key = new.wrapped_key
        row = {"instance": new.id, "provider": key.provider, "key_id": key.key_id, "blob": key.blob}
        connection.execute(sa.insert(data_keys), row)
        state_row = {"instance": new.id, "kind": int(StateKind.PERMANENT), "epoch": 0, "version": 1, "blob": new.sealed}
        connection.execute(sa.insert(states), state_row)
        self.certificates.add_rows(connection, new.certificates)
        self.freshness.record(connection, LogKind.CREATED, new.id)

    @staticmethod
    def _insert_labels(connection: sa.Connection, instance: uuid.UUID, values: Mapping[str, str]) -> None:
        rows = [{"instance": instance, "key": key, "value": value} for key, value in values.items()]
        if rows:
            connection.execute(sa.insert(labels), rows)

    def set_labels(self, instance: uuid.UUID, values: Mapping[str, str], revision: int | None) -> InstanceRecord:
        """Replace the labels; with `revision`, only if it is still the present one.

        Raises:
            ConflictError: ETAG_MISMATCH.
        """
        with self._writing() as connection:
            self._change(connection, instance, {}, revision=revision)
            connection.execute(sa.delete(labels).where(labels.c.instance == instance))
            self._insert_labels(connection, instance, values)
            return self._by_id(connection, instance)

    def set_keys(self, instance: uuid.UUID, keys: tuple[KeyRecord, ...], pcr_banks: tuple[str, ...]) -> InstanceRecord:
        """Replace the record of the TPM's keys; and of its PCR banks, if they are known."""
        with self._writing() as connection:
            values = {"keys": dump_keys(keys)}
            if pcr_banks:
                profile = dataclasses.replace(self._trusted(connection, instance).profile, pcr_banks=pcr_banks)
                values["profile"] = dump_profile(profile)
            self._change(connection, instance, values)
            return self._by_id(connection, instance)

    def acquire(self, instance: uuid.UUID, *, boot_id: str, revision: int | None = None) -> InstanceRecord:
        """Take ownership of an instance that is OFF or FAILED: ON, under the next epoch (invariant 3).

        Raises:
            FailedPreconditionError: INSTANCE_ALREADY_ON.
            SealedStateError: EPOCH_SET_BACK, the sealed state is of a later epoch than the row.
        """
        with self._writing() as connection:
            record = self._trusted(connection, instance)
            if record.state is InstanceState.ON:
                raise FailedPreconditionError(
                    "INSTANCE_ALREADY_ON", "the instance is ON", subject=record.name, remedy=f"vtpm instance stop {record.name}"
                )
            self._check_epoch(connection, record)
            values = {"state": InstanceState.ON.value, "failure": "", "boot_id": boot_id, "epoch": record.epoch + 1}
            self._change(connection, instance, values, revision=revision)
            self._forget_snapshots(connection, instance)
            return self._by_id(connection, instance)

    @staticmethod
    def _check_epoch(connection: sa.Connection, record: InstanceRecord) -> None:
        """A row that was set back to what it was has its MAC, but no state of its future.

        Raises:
            SealedStateError: EPOCH_SET_BACK.
        """
        query = sa.select(sa.type_coerce(states.c.epoch, sa.types.NullType()))
        query = query.where(states.c.instance == record.id, states.c.kind == int(StateKind.PERMANENT))
        epoch: Any = connection.execute(query).scalar()
        if type(epoch) is int and epoch > record.epoch:
            raise SealedStateError(
                "EPOCH_SET_BACK",
                f"the sealed state is of epoch {epoch}, which the instance's row (epoch {record.epoch}) has not come to: "
                "something else has set the row back",
                subject=record.name,
                remedy=f"restore this instance: vtpm backup restore FILE --instance {record.name}, or put the right store back",
            )

    def _trusted(self, connection: sa.Connection, instance: uuid.UUID) -> InstanceRecord:
        """Return an instance whose row is as the service wrote it.

        Raises:
            SealedStateError: ROW_MAC_MISMATCH.
        """
        record = self._by_id(connection, instance)
        if is_refused(record):
            raise mismatch("instances", record.name)
        return record

    @staticmethod
    def _forget_snapshots(connection: sa.Connection, instance: uuid.UUID) -> None:
        """Invariant 2: what goes on or off has no volatile state from before."""
        for table in (snapshots, snapshot_uses):
            connection.execute(sa.delete(table).where(table.c.instance == instance))

    def release(self, instance: uuid.UUID, epoch: int) -> InstanceRecord:
        """Take an instance that is ON or FAILED under `epoch` to OFF.

        Raises:
            ConflictError: EPOCH_STALE.
        """
        return self._leave(instance, epoch, {"state": InstanceState.OFF.value, "failure": "", "boot_id": ""}, ("ON", "FAILED"))

    def fail(self, instance: uuid.UUID, epoch: int, failure: Failure) -> InstanceRecord:
        """Take an instance that is ON under `epoch` to FAILED.

        Raises:
            ConflictError: EPOCH_STALE.
        """
        values = {"state": InstanceState.FAILED.value, "failure": dump_failure(failure), "boot_id": ""}
        return self._leave(instance, epoch, values, ("ON",))

    def _leave(self, instance: uuid.UUID, epoch: int, values: dict[str, Any], from_states: tuple[str, ...]) -> InstanceRecord:
        with self._writing() as connection:
            record = self._trusted(connection, instance)
            if record.epoch != epoch or record.state.value not in from_states:
                raise ConflictError(
                    "EPOCH_STALE",
                    f"the instance is {record.state.value} under epoch {record.epoch}, not under {epoch}",
                    subject=record.name,
                    remedy="another owner has taken it over; nothing to do",
                )
            self._change(connection, instance, values)
            self._forget_snapshots(connection, instance)
            return self._by_id(connection, instance)

    def _change(
        self, connection: sa.Connection, instance: uuid.UUID, values: dict[str, Any], *, revision: int | None = None
    ) -> None:
        """Change an instance's row and its MAC with it; what is there must be what the service wrote.

        Raises:
            ConflictError: ETAG_MISMATCH.
            NotFoundError: INSTANCE_NOT_FOUND.
            SealedStateError: ROW_MAC_MISMATCH.
        """
        query = INSTANCES.select().where(instances.c.id == instance, instances.c.state.not_in(_HIDDEN))
        row = connection.execute(query).first()
        if row is None:
            self._by_id(connection, instance)
        self.macs.check(INSTANCES, row, str(instance))
        assert row is not None
        if revision is not None and row.revision != revision:
            raise ConflictError(
                "ETAG_MISMATCH", "the instance was changed meanwhile", subject=row.name, remedy="read it again and retry"
            )
        self.macs.change(connection, INSTANCES, row, {"revision": row.revision + 1, "updated_at": now(), **values})

    def commit(self, commits: Sequence[AnyCommit]) -> Sequence[str]:
        """See vtpm.store.commits.StateCommits.commit."""
        return self._commits.commit(commits)

    # ---- deletion --------------------------------------------------------------------------------------------------------

    def delete(self, instance: uuid.UUID, revision: int | None) -> InstanceRecord:
        """Delete an instance that is OFF or FAILED: its data key first, durably (crypto-erase), then the rest.

        Raises:
            FailedPreconditionError: INSTANCE_ON.
            StoreError: ERASURE_PENDING, the data key is deleted and a copy is left in the log of the store.
        """
        with self._writing() as connection:
            record = self._by_id(connection, instance)
            if record.state is InstanceState.ON:
                raise FailedPreconditionError(
                    "INSTANCE_ON", "an instance that is ON can't be deleted", subject=record.name,
                    remedy=f"vtpm instance stop {record.name}",
                )  # fmt: skip
            # Its name is free at once, however long the erasure of what is left of its key takes.
            # Without a new MAC: nothing is decided any more on a row of an instance that is gone, and one that is not as it
            # was written can be deleted too.
            if revision is not None and record.revision != revision:
                raise ConflictError(
                    "ETAG_MISMATCH", "the instance was changed meanwhile", subject=record.name, remedy="read it again and retry"
                )
            gone = sa.update(instances).where(instances.c.id == instance, instances.c.state.not_in(_HIDDEN))
            connection.execute(gone.values(state=_DELETING, name=f"~{instance.hex}"))
            connection.execute(sa.delete(data_keys).where(data_keys.c.instance == instance))
            self.freshness.record(connection, LogKind.DELETED, instance)
            self.certificates.revoke_rows(connection, certificates.c.instance == instance, "cessationOfOperation", now())
            crash_point("delete.before_erase")
        self._finish_deletions()
        return record

    def _finish_deletions(self) -> None:
        """Erase what is left of the data keys of deleted instances, then forget the instances."""
        with self._reading() as connection:
            any_doomed = sa.select(sa.literal(1)).select_from(instances).where(instances.c.state == _DELETING).limit(1)
            if connection.execute(any_doomed).first() is None:
                return
        # The write-ahead log would keep the old page until it is overwritten.
        with database.errors(self._url), self._read_engine.connect() as connection:
            autocommit = connection.execution_options(isolation_level="AUTOCOMMIT")
            busy = autocommit.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar()
        if busy:
            raise StoreError(
                "ERASURE_PENDING",
                "the instance is deleted, but a process that reads the store keeps its wrapped data key from being erased",
                subject=self._url,
                remedy="end that process; the next deletion or start of the daemon erases the rest",
            )
        crash_point("delete.after_erase")
        with self._writing() as connection:
            doomed = sa.select(instances.c.id).where(instances.c.state == _DELETING).scalar_subquery()
            for table in (snapshot_uses, snapshots, states, labels, data_keys):
                connection.execute(sa.delete(table).where(table.c.instance.in_(doomed)))
            connection.execute(sa.delete(instances).where(instances.c.state == _DELETING))
            crash_point("delete.before_commit")

    def adopt_rows(self, key: uuid.UUID, wrapped: WrappedKey, *, sign: bool) -> None:
        """Keep the wrapped key of the rows and, with `sign`, take every row as it is, in one transaction."""
        with self._writing() as connection:
            row = {"id": key, "provider": wrapped.provider, "key_id": wrapped.key_id, "blob": wrapped.blob}
            connection.execute(sa.insert(authority_keys), row)
            count = sign_all(connection, self.macs) if sign else 0
            crash_point("rows.before_adopt")
        if count:
            log.info("store.rows_adopted", count=count)

    # ---- key rotation ----------------------------------------------------------------------------------------------------

    def wrapped_keys(self, after: uuid.UUID | None, limit: int) -> Sequence[tuple[uuid.UUID, WrappedKey]]:
        """Return up to `limit` wrapped data keys ordered by instance, from behind `after`.

        Raises:
            StoreError: DATA_KEY_ROW_INVALID, a row names no instance. A row left out here would end with the key that wraps it.
        """
        query = sa.select(data_keys).order_by(data_keys.c.instance).limit(limit)
        if after is not None:
            query = query.where(data_keys.c.instance > after)
        with self._reading() as connection:
            try:
                return [(row.instance, WrappedKey(row.provider, row.key_id, row.blob)) for row in connection.execute(query)]
            except (ValueError, TypeError, AttributeError):
                raise StoreError(
                    "DATA_KEY_ROW_INVALID",
                    "a row of data_keys names no instance; the service did not write it",
                    subject=self._url,
                    remedy="find out who can write the store, and restore it from a backup; the keys are as they were",
                ) from None

    def rewrap(self, updates: Sequence[tuple[uuid.UUID, WrappedKey, WrappedKey]]) -> int:
        """Replace each old wrapped key by its new one where it is still the old one; return how many. State is not touched."""
        with self._writing() as connection:
            changed = 0
            for instance, old, new in updates:
                query = sa.update(data_keys).where(data_keys.c.instance == instance, data_keys.c.blob == old.blob)
                values = {"provider": new.provider, "key_id": new.key_id, "blob": new.blob}
                changed += connection.execute(query.values(values)).rowcount
            crash_point("rewrap.before_commit")
        crash_point("rewrap.after_commit")
        return changed
