"""The key of the rows' MACs (vtpm.store.macs): wrapped by the key provider as instances' data keys are.

The key provider remembers outside the store that a store's rows carry MACs, and under which key. So who can write the store
can't have rows signed again by taking the MACs away, or the wrapped key, or by setting the schema back.
"""

from __future__ import annotations

import uuid
from hashlib import sha256
from typing import TYPE_CHECKING, Final

import structlog

from vtpm.crashpoints import crash_point
from vtpm.errors import KeyProviderError, VtpmError
from vtpm.seal.keys import KeyProvider, new_data_key

if TYPE_CHECKING:
    from vtpm.store.store import Store

log: Final = structlog.get_logger("vtpm.store")

# In the place of an instance's id, for the provider: no instance has it, as theirs are of version 4.
ROW_KEY: Final = uuid.uuid5(uuid.NAMESPACE_URL, "urn:vtpm:row-key")
_RESTORE: Final = "restore the store from a backup: docs/certificates.md, `What the store can't be made to say`"


def open_row_key(store: Store, keys: KeyProvider, *, restored: bool = False) -> None:
    """Give `store` the key of its rows. Where neither it nor the key provider knows of one, the rows get their MACs now, once.

    `restored`: an operator has just put this store there, so that what is in it counts as it is.

    Raises:
        KeyProviderError: ROW_KEY_MISSING, ROW_KEY_FOREIGN, or the key can't be unwrapped. Nothing is replaced (invariant 7).
        SealedStateError: the wrapped key is damaged.
    """
    known = keys.remembered()
    wrapped = store.authorities.wrapped_key(ROW_KEY)
    if wrapped is not None:
        try:
            key = keys.unwrap(wrapped, ROW_KEY)
        except VtpmError as error:
            # The provider takes every id for an instance's.
            error.message = error.message.replace(f"instance {ROW_KEY}", "the rows")
            error.remedy = error.remedy if isinstance(error, KeyProviderError) else _RESTORE
            raise
        if known and _mark(key) not in known and not restored:
            raise KeyProviderError(
                "ROW_KEY_FOREIGN", "the key of the store's rows is that of another store", subject="store", remedy=_RESTORE
            )
        store.macs.use(key)
    else:
        trusted = restored or not known
        if not trusted and not store.is_empty():
            raise KeyProviderError(
                "ROW_KEY_MISSING",
                "the rows of the store carry MACs, and the key of these is not in it: something else has changed the store",
                subject="store",
                remedy=_RESTORE,
            )
        key = new_data_key()
        wrapped = keys.wrap(key, ROW_KEY)
        store.macs.use(key)
        store.adopt_rows(ROW_KEY, wrapped, sign=trusted)
        crash_point("rows.after_adopt")
    if _mark(key) not in known:
        keys.remember(_mark(key))


def rewrap_row_key(store: Store, keys: KeyProvider, key_id: str) -> int:
    """Wrap the key under the provider's key `key_id`, if it is not yet; return how many were wrapped anew."""
    wrapped = store.authorities.wrapped_key(ROW_KEY)
    if wrapped is None or wrapped.key_id == key_id:
        return 0
    store.authorities.set_wrapped_key(ROW_KEY, keys.wrap(keys.unwrap(wrapped, ROW_KEY), ROW_KEY))
    return 1


def _mark(key: bytes) -> str:
    """Return what tells one row key from another, and nothing of the key."""
    return sha256(b"vtpm row key\0" + key).hexdigest()[:32]
