"""The data key that seals the CA's private keys: wrapped by the key provider as instances' data keys are."""

from __future__ import annotations

import uuid
from typing import Final

from vtpm.errors import VtpmError
from vtpm.seal.keys import KeyProvider, new_data_key
from vtpm.store.authorities import Authorities

# In the place of an instance's id, for the provider: no instance has it, as theirs are of version 4.
AUTHORITY_KEY: Final = uuid.uuid5(uuid.NAMESPACE_URL, "urn:vtpm:certificate-authority")


def open_authority_key(authorities: Authorities, keys: KeyProvider) -> bytes:
    """Return the data key; it is made and kept at the first call.

    Raises:
        KeyProviderError, SealedStateError: it can't be unwrapped. Nothing is replaced (invariant 7).
    """
    wrapped = authorities.wrapped_key(AUTHORITY_KEY)
    if wrapped is not None:
        try:
            return keys.unwrap(wrapped, AUTHORITY_KEY)
        except VtpmError as error:
            # The provider takes every id for an instance's.
            error.message = error.message.replace(f"instance {AUTHORITY_KEY}", "the certificate authority")
            error.remedy = f"{error.remedy}; to start without a CA: ca = none".removeprefix("; ")
            raise
    data_key = new_data_key()
    authorities.set_wrapped_key(AUTHORITY_KEY, keys.wrap(data_key, AUTHORITY_KEY))
    return data_key


def rewrap_authority_key(authorities: Authorities, keys: KeyProvider, key_id: str) -> int:
    """Wrap the data key under the provider's key `key_id`, if it is not yet; return how many were wrapped anew."""
    wrapped = authorities.wrapped_key(AUTHORITY_KEY)
    if wrapped is None or wrapped.key_id == key_id:
        return 0
    authorities.set_wrapped_key(AUTHORITY_KEY, keys.wrap(keys.unwrap(wrapped, AUTHORITY_KEY), AUTHORITY_KEY))
    return 1
