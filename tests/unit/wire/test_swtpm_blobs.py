"""State blobs with the keys of --key and --migration-key: what is built opens, and nothing that was changed does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.errors import InvalidArgumentError, SealedStateError, VtpmError
from vtpm.wire import swtpm_state

KEYS = (None, bytes(range(16)), bytes(range(32)))
OTHER = bytes(range(1, 33))
keys = st.sampled_from(KEYS)


@settings(deadline=None)
@given(payload=st.binary(min_size=1, max_size=200), key=keys, migration_key=keys)
def test_what_is_built_opens_with_the_same_keys(payload: bytes, key: bytes | None, migration_key: bytes | None) -> None:
    blob = swtpm_state.build_blob(payload, key, migration_key)
    assert swtpm_state.open_blob(blob, key, migration_key) == payload
    assert swtpm_state.is_encrypted(blob) == (key is not None or migration_key is not None)
    assert swtpm_state.is_whole(blob)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("migration_key", KEYS[1:])
def test_without_the_migration_key_it_stays_closed(key: bytes | None, migration_key: bytes) -> None:
    blob = swtpm_state.build_blob(b"a state", key, migration_key)
    for wrong in (None, *KEYS[1:], OTHER):
        if wrong != migration_key:
            with pytest.raises((SealedStateError, InvalidArgumentError)):
                swtpm_state.open_blob(blob, key, wrong)
    assert b"a state" not in blob


@settings(deadline=None, max_examples=200)
@given(data=st.data(), key=keys, migration_key=st.sampled_from(KEYS[1:]))
def test_a_flipped_bit_is_never_another_state(data: st.DataObject, key: bytes | None, migration_key: bytes) -> None:
    blob = bytearray(swtpm_state.build_blob(b"the only state", key, migration_key))
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        opened = swtpm_state.open_blob(bytes(blob), key, migration_key)
    except VtpmError:
        return
    # The versions in the header are not authenticated.
    assert opened == b"the only state"


@settings(deadline=None)
@given(blob=st.binary(max_size=200), encrypted=st.booleans(), key=keys, migration_key=keys)
def test_any_bytes_are_refused_by_name(blob: bytes, encrypted: bool, key: bytes | None, migration_key: bytes | None) -> None:
    with pytest.raises(VtpmError):
        swtpm_state.open_blob(blob, key, migration_key, encrypted=encrypted)
    assert swtpm_state.is_encrypted(blob) in (True, False)
