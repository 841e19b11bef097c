"""Issued certificates: what was certified for whom, what is in force, what is revoked. Synchronous and thread-safe."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa

from vtpm.store import database
from vtpm.store.model import CertificateRecord
from vtpm.store.rows import utc
from vtpm.store.schema import certificates, counters

_CRL_NUMBER: Final = "crl_number"
_CHUNK: Final = 500


class Certificates:
    """The table of certificates, over the store's engines."""

    def __init__(self, url: str, read: sa.Engine, write: sa.Engine) -> None:
        self._url = url
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

    def _select(self, *conditions: Any, order: Sequence[Any] = (), limit: int | None = None) -> list[CertificateRecord]:
        query = sa.select(certificates).where(*conditions).order_by(*order).limit(limit)
        with database.errors(self._url), self._read_engine.begin() as connection:
            return [_record(row) for row in connection.execute(query)]

    # ---- writing ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def add_rows(connection: sa.Connection, records: Sequence[CertificateRecord]) -> None:
        """Record certificates inside a transaction of the caller's, so that creation and issuance are one step."""
        if records:
            connection.execute(sa.insert(certificates), [_row(record) for record in records])

    def add(self, records: Sequence[CertificateRecord]) -> None:
        """Record certificates."""
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
            same = (
                certificates.c.instance == instance,
                certificates.c.kind == kind,
                certificates.c.algorithm == algorithm,
                certificates.c.current,
            )
            connection.execute(sa.update(certificates).where(*same).values(current=False))
            self.add_rows(connection, [record])

    def revoke(self, which: uuid.UUID | Sequence[int], reason: str, now: dt.datetime) -> list[CertificateRecord]:
        """Revoke all of an instance's certificates that have not expired, or those of these serials; return those that were not
        revoked before."""
        with database.errors(self._url), self._write_engine.begin() as connection:
            if isinstance(which, uuid.UUID):
                mine = sa.and_(certificates.c.instance == which, certificates.c.not_after > _naive(now))
                return self.revoke_rows(connection, mine, reason, now)
            serials = [_text(serial) for serial in which]
            return self.revoke_rows(connection, certificates.c.serial.in_(serials), reason, now)

    @staticmethod
    def revoke_rows(connection: sa.Connection, condition: Any, reason: str, now: dt.datetime) -> list[CertificateRecord]:
        """Revoke what `condition` selects, inside a transaction of the caller's; return those that were not revoked before."""
        pending = sa.and_(condition, certificates.c.revoked_at.is_(None))
        found = [row.serial for row in connection.execute(sa.select(certificates.c.serial).where(pending))]
        revoked: list[CertificateRecord] = []
        for start in range(0, len(found), _CHUNK):
            part = certificates.c.serial.in_(found[start : start + _CHUNK])
            values = {"revoked_at": _naive(now), "revocation_reason": reason}
            connection.execute(sa.update(certificates).where(part).values(values))
            revoked += [_record(row) for row in connection.execute(sa.select(certificates).where(part))]
        return revoked

    def next_crl_number(self) -> int:
        """Return a CRL number that was not used before, by any issuer."""
        with database.errors(self._url), self._write_engine.begin() as connection:
            query = sa.select(counters.c.value).where(counters.c.name == _CRL_NUMBER)
            value = connection.execute(query).scalar()
            if value is None:
                connection.execute(sa.insert(counters), {"name": _CRL_NUMBER, "value": 1})
                return 1
            connection.execute(sa.update(counters).where(counters.c.name == _CRL_NUMBER).values(value=value + 1))
            return int(value) + 1

    def forget_expired(self, before: dt.datetime) -> int:
        """Forget certificates that expired before `before` and are not in force; return how many."""
        query = sa.delete(certificates).where(
            certificates.c.not_after < _naive(before),
            sa.or_(sa.not_(certificates.c.current), certificates.c.revoked_at.is_not(None)),
        )
        with database.errors(self._url), self._write_engine.begin() as connection:
            return connection.execute(query).rowcount


def _text(serial: int) -> str:
    return f"{serial:040x}"


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
    }


def _record(row: Any) -> CertificateRecord:
    return CertificateRecord(
        serial=int(row.serial, 16),
        instance=row.instance,
        kind=row.kind,
        algorithm=row.algorithm,
        der=row.der,
        not_before=utc(row.not_before),
        not_after=utc(row.not_after),
        issuer_key_id=row.issuer_key_id,
        revoked_at=utc(row.revoked_at) if row.revoked_at else None,
        revocation_reason=row.revocation_reason,
        current=row.current,
    )
