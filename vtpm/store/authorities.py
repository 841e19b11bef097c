"""The certificate authority's material: chains, sealed private keys, and the wrapped key that seals them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa

from vtpm.crashpoints import crash_point
from vtpm.seal.keys import WrappedKey
from vtpm.store import database
from vtpm.store.macs import AUTHORITIES, RowMacs
from vtpm.store.model import AuthorityRecord
from vtpm.store.rows import now
from vtpm.store.schema import authorities, authority_keys

# The state of an authority whose row is not believed.
REFUSED: Final = "REFUSED"


class Authorities:
    """The tables of authorities, over the store's engines. Synchronous and thread-safe."""

    def __init__(self, url: str, read: sa.Engine, write: sa.Engine, macs: RowMacs) -> None:
        self._url = url
        self._macs = macs
        self._read_engine = read
        self._write_engine = write

    def list(self) -> Sequence[AuthorityRecord]:
        """Return every authority, oldest first; one whose row is not as it was written has the state REFUSED."""
        query = AUTHORITIES.select().order_by(authorities.c.created_at, authorities.c.role.desc())
        found = []
        with database.errors(self._url), self._read_engine.begin() as connection:
            for row in connection.execute(query):
                if self._macs.is_right(AUTHORITIES, row):
                    fields = (row.role, row.state, row.key_id, row.chain, row.signer, row.key)
                    found.append(AuthorityRecord(uuid.UUID(row.id), *fields))
                else:
                    found.append(AuthorityRecord(uuid.UUID(int=0), "", REFUSED, b"", "", "", b""))
        return found

    def install(self, records: Sequence[AuthorityRecord], *, fulfilled: uuid.UUID | None = None) -> None:
        """Add authorities, in one transaction. What is CURRENT takes the place of the present one of its role, which retires.

        `fulfilled` is a pending request that is done with. A new issuing authority without a root of ours retires the root too:
        that one signs nothing any more.
        """
        moment = now()
        with database.errors(self._url), self._write_engine.begin() as connection:
            if any(record.state == "CURRENT" for record in records):
                roles = ("ROOT", "ISSUING")
                keep_root = all(record.role != "ROOT" for record in records) and self._same_root(connection, records)
                replaced = roles[1:] if keep_root else roles
                for row in self._rows(connection, authorities.c.role.in_(replaced), authorities.c.state == "CURRENT"):
                    # A root that has retired signs nothing any more: its key is destroyed.
                    gone = {"state": "RETIRED"} | ({"key": b""} if row.role == "ROOT" else {})
                    self._macs.change(connection, AUTHORITIES, row, gone)
            if fulfilled is not None:
                connection.execute(sa.delete(authorities).where(authorities.c.id == fulfilled))
            for record in records:
                values = {
                    "id": record.id,
                    "role": record.role,
                    "state": record.state,
                    "key_id": record.key_id,
                    "chain": record.chain,
                    "signer": record.signer,
                    "key": record.key,
                    "created_at": moment,
                }
                connection.execute(sa.insert(authorities), self._macs.signed(AUTHORITIES, values))
            crash_point("authority.before_commit")

    def _rows(self, connection: sa.Connection, *conditions: Any) -> Sequence[Any]:
        """Return the rows that are as they were written."""
        rows = connection.execute(AUTHORITIES.select().where(*conditions)).all()
        return [row for row in rows if self._macs.is_right(AUTHORITIES, row)]

    def _same_root(self, connection: sa.Connection, records: Sequence[AuthorityRecord]) -> bool:
        roots = self._rows(connection, authorities.c.role == "ROOT", authorities.c.state == "CURRENT")
        return bool(roots) and all(record.chain.endswith(roots[0].chain) for record in records)

    def discard_pending(self) -> int:
        """Forget requests whose certificate has not come back; return how many."""
        query = sa.delete(authorities).where(authorities.c.state == "PENDING")
        with database.errors(self._url), self._write_engine.begin() as connection:
            return connection.execute(query).rowcount

    # ---- the data key ----------------------------------------------------------------------------------------------------

    def wrapped_key(self, key: uuid.UUID) -> WrappedKey | None:
        """Return the wrapped data key of this id; None before there is one."""
        query = sa.select(authority_keys).where(authority_keys.c.id == key)
        with database.errors(self._url), self._read_engine.begin() as connection:
            row = connection.execute(query).first()
        return None if row is None else WrappedKey(row.provider, row.key_id, row.blob)

    def set_wrapped_key(self, key: uuid.UUID, wrapped: WrappedKey) -> None:
        """Set the wrapped data key of this id: the first one, or the same data key wrapped anew."""
        values = {"provider": wrapped.provider, "key_id": wrapped.key_id, "blob": wrapped.blob}
        with database.errors(self._url), self._write_engine.begin() as connection:
            changed = connection.execute(sa.update(authority_keys).where(authority_keys.c.id == key).values(values))
            if changed.rowcount == 0:
                connection.execute(sa.insert(authority_keys), {"id": key, **values})
            crash_point("authority.before_commit")
