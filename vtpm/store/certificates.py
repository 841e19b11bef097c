"""Issued certificates: what was certified for whom, what is in force, what is revoked. Synchronous and thread-safe.

A row that is not as it was written (vtpm.store.macs) is in force for nobody, and counts as revoked.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
import uuid
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Final

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from vtpm.errors import AlreadyExistsError
from vtpm.store import database
from vtpm.store.macs import CERTIFICATES, COUNTERS, RowMacs
from vtpm.store.model import CertificateRecord
from vtpm.store.rows import moment_of, now
from vtpm.store.schema import certificates, counters

_CRL_NUMBER: Final = "crl_number"
_CHUNK: Final = 500


class Certificates:
    """The table of certificates, over the store's engines."""

    def __init__(self, url: str, read: sa.Engine, write: sa.Engine, macs: RowMacs) -> None:
        self._url = url
        self._macs = macs
        self._read_engine = read
        self._write_engine = write

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def current(self, instance: uuid.UUID) -> list[CertificateRecord]:
        """Return the certificates in force for an instance's keys and platform, ordered by kind and algorithm."""
        order = (certificates.c.kind, certificates.c.algorithm)
        return self._select(certificates.c.instance == instance, certificates.c.current, order=order)

    def history(self, instance: uuid.UUID) -> list[CertificateRecord]:
        """Return every recorded certificate of an instance, newest first."""
        return self._select(certificates.c.instance == instance, order=(certificates.c.not_before.desc(),))

    def by_serials(self, serials: Sequence[int]) -> list[CertificateRecord]:
        """Return those of `serials` that were issued here."""
        return self._select(certificates.c.serial.in_([_text(serial) for serial in serials]))

    def revoked(self, issuer_key_id: bytes, not_expired_at: dt.datetime) -> list[CertificateRecord]:
        """Return what an issuer's CRL must name: revoked, and not expired at `not_expired_at`."""
        return self._select(
            certificates.c.revoked_at.is_not(None),
            certificates.c.issuer_key_id == issuer_key_id,
            certificates.c.not_after > _naive(not_expired_at),
            order=(certificates.c.revoked_at, certificates.c.serial),
        )

    def expiring(self, kind: str, before: dt.datetime, limit: int) -> list[CertificateRecord]:
        """Return up to `limit` certificates in force that expire before `before`, the next to expire first."""
        return self._select(
            certificates.c.kind == kind,
            certificates.c.current,
            certificates.c.revoked_at.is_(None),
            certificates.c.not_after < _naive(before),
            order=(certificates.c.not_after,),
            limit=limit,
        )

    def refused(self) -> list[int]:
        """Return the serials of all rows that are not as they were written. Every row is looked at."""
        found: list[int] = []
        with database.errors(self._url), self._read_engine.begin() as connection:
            for row in connection.execution_options(yield_per=_CHUNK).execute(CERTIFICATES.select()):
                if not self._macs.is_right(CERTIFICATES, row) and (serial := _serial_of(row.serial)):
                    found.append(serial)
        return found

    def _select(self, *conditions: Any, order: Sequence[Any] = (), limit: int | None = None) -> list[CertificateRecord]:
        with database.errors(self._url), self._read_engine.begin() as connection:
            return [_record(row) for row in self._rows(connection, *conditions, order=order, limit=limit)]

    def _rows(
        self, connection: sa.Connection, *conditions: Any, order: Sequence[Any] = (), limit: int | None = None
    ) -> list[Any]:
        """Return the rows that are as they were written."""
        query = CERTIFICATES.select().where(*conditions).order_by(*order).limit(limit)
        return [row for row in connection.execute(query).all() if self._macs.is_right(CERTIFICATES, row)]

    # ---- writing ---------------------------------------------------------------------------------------------------------

    def add_rows(self, connection: sa.Connection, records: Sequence[CertificateRecord]) -> None:
        """Record certificates inside a transaction of the caller's, so that creation and issuance are one step.

        Invariant 9: one key, one instance. What is recorded first has it; a certificate leaves the process after that.

        Raises:
            AlreadyExistsError: KEY_CERTIFIED_ELSEWHERE.
        """
        for record in records:
            if record.subject_key:
                self._refuse_other_holder(connection, record)
            connection.execute(sa.insert(certificates), self._macs.signed(CERTIFICATES, _row(record)))

    def _refuse_other_holder(self, connection: sa.Connection, record: CertificateRecord) -> None:
        others = self._rows(
            connection,
            certificates.c.subject_key == record.subject_key,
            certificates.c.instance != record.instance,
            certificates.c.revoked_at.is_(None),
            certificates.c.not_after > now(),
        )
        if others:
            raise AlreadyExistsError(
                "KEY_CERTIFIED_ELSEWHERE",
                f"the {record.kind} is certified for another instance already",
                subject=str(record.instance),
                remedy="nothing was certified; a TPM that shows another's key was copied, or its worker lies",
            )

    def add(self, records: Sequence[CertificateRecord]) -> None:
        """Record certificates.

        Raises:
            AlreadyExistsError: KEY_CERTIFIED_ELSEWHERE.
        """
        with database.errors(self._url), self._write_engine.begin() as connection:
            self.add_rows(connection, records)

    def replace(
        self, instance: uuid.UUID, kind: str, algorithm: str, record: CertificateRecord, nv_version: int | None = None
    ) -> None:
        """Put `record` in force in the place of what certifies the same key; the old one stays recorded.

        `nv_version` is for the one who writes it to NV, and not kept.
        """
        del nv_version
        with database.errors(self._url), self._write_engine.begin() as connection:
            self.retire_rows(connection, instance, kind, algorithm)
            self.add_rows(connection, [record])

    def retire_rows(self, connection: sa.Connection, instance: uuid.UUID, kind: str, algorithm: str) -> None:
        """What certifies this key is in force no more, inside a transaction of the caller's."""
        same = (
            certificates.c.instance == instance,
            certificates.c.kind == kind,
            certificates.c.algorithm == algorithm,
            certificates.c.current,
        )
        for row in self._rows(connection, *same):
            self._macs.change(connection, CERTIFICATES, row, {"current": False})

    def put_row_in_force(self, connection: sa.Connection, record: CertificateRecord) -> None:
        """Have a recorded certificate take the place of what certifies the same key, inside a transaction of the caller's."""
        self.retire_rows(connection, record.instance, record.kind, record.algorithm)
        for row in self._rows(connection, certificates.c.serial == _text(record.serial)):
            self._macs.change(connection, CERTIFICATES, row, {"current": True})

    def revoke(self, which: uuid.UUID | Sequence[int], reason: str, now: dt.datetime) -> list[CertificateRecord]:
        """Revoke all of an instance's certificates that have not expired, or those of these serials; return those that were not
        revoked before."""
        with database.errors(self._url), self._write_engine.begin() as connection:
            if isinstance(which, uuid.UUID):
                mine = sa.and_(certificates.c.instance == which, certificates.c.not_after > _naive(now))
                return self.revoke_rows(connection, mine, reason, now)
            serials = [_text(serial) for serial in which]
            return self.revoke_rows(connection, certificates.c.serial.in_(serials), reason, now)

    def revoke_rows(self, connection: sa.Connection, condition: Any, reason: str, now: dt.datetime) -> list[CertificateRecord]:
        """Revoke what `condition` selects, inside a transaction of the caller's; return those that were not revoked before.

        A row that is refused counts as revoked already.
        """
        values = {"revoked_at": _naive(now), "revocation_reason": reason}
        serials = []
        for row in self._rows(connection, condition, certificates.c.revoked_at.is_(None)):
            self._macs.change(connection, CERTIFICATES, row, values)
            serials.append(row.serial)
        revoked: list[CertificateRecord] = []
        for start in range(0, len(serials), _CHUNK):
            part = certificates.c.serial.in_(serials[start : start + _CHUNK])
            revoked += [_record(row) for row in self._rows(connection, part)]
        return revoked

    def next_crl_number(self) -> int:
        """Return a CRL number that was not used before, by any issuer.

        Where the row of the last one is not as it was written, numbers go on from the present time in seconds: higher than any
        that was counted up one by one.
        """
        with database.errors(self._url), self._write_engine.begin() as connection:
            row = connection.execute(COUNTERS.select().where(counters.c.name == _CRL_NUMBER)).first()
            if row is None:
                self._insert_crl_number(connection, 1)
                return 1
            if self._macs.is_right(COUNTERS, row):
                self._macs.change(connection, COUNTERS, row, {"value": row.value + 1})
                return int(row.value) + 1
            number = int(time.time())
            connection.execute(sa.delete(counters).where(counters.c.name == _CRL_NUMBER))
            self._insert_crl_number(connection, number)
            return number

    def _insert_crl_number(self, connection: sa.Connection, value: int) -> None:
        connection.execute(sa.insert(counters), self._macs.signed(COUNTERS, {"name": _CRL_NUMBER, "value": value}))

    def forget_expired(self, before: dt.datetime) -> int:
        """Forget certificates that expired before `before` and are not in force; return how many."""
        query = sa.delete(certificates).where(
            certificates.c.not_after < _naive(before),
            sa.or_(sa.not_(certificates.c.current), certificates.c.revoked_at.is_not(None)),
        )
        with database.errors(self._url), self._write_engine.begin() as connection:
            return connection.execute(query).rowcount


def subject_key_of(kind: str, der: bytes) -> bytes:
    """Return what tells by which key a certificate is held: SHA-256 over its SubjectPublicKeyInfo; empty for PLATFORM.

    A certificate that can't be read, which none of this service's is, has none.
    """
    if kind == "PLATFORM":
        return b""
    with contextlib.suppress(ValueError, TypeError):
        return key_digest(x509.load_der_x509_certificate(der).public_key())
    return b""


def key_digest(key: PublicKeyTypes) -> bytes:
    """Return SHA-256 over a public key's SubjectPublicKeyInfo."""
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def _text(serial: int) -> str:
    return f"{serial:040x}"


def _serial_of(text: Any) -> int:
    """Return the serial number of a row that may hold anything; 0 if that is none."""
    with contextlib.suppress(ValueError, TypeError):
        if len(text) <= 40:
            return int(text, 16)
    return 0


def _naive(moment: dt.datetime) -> dt.datetime:
    return moment.astimezone(dt.UTC).replace(tzinfo=None) if moment.tzinfo else moment


def _row(record: CertificateRecord) -> dict[str, Any]:
    return {
        "serial": _text(record.serial),
        "instance": record.instance,
        "kind": record.kind,
        "algorithm": record.algorithm,
        "der": record.der,
        "not_before": _naive(record.not_before),
        "not_after": _naive(record.not_after),
        "issuer_key_id": record.issuer_key_id,
        "revoked_at": _naive(record.revoked_at) if record.revoked_at else None,
        "revocation_reason": record.revocation_reason,
        "current": record.current,
        "subject_key": record.subject_key,
    }


def _record(row: Any) -> CertificateRecord:
    return CertificateRecord(
        serial=int(row.serial, 16),
        instance=uuid.UUID(row.instance),
        kind=row.kind,
        algorithm=row.algorithm,
        der=row.der,
        not_before=moment_of(row.not_before),
        not_after=moment_of(row.not_after),
        issuer_key_id=row.issuer_key_id,
        revoked_at=moment_of(row.revoked_at) if row.revoked_at else None,
        revocation_reason=row.revocation_reason,
        current=bool(row.current),
        subject_key=row.subject_key,
    )
