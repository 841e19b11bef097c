"""Sealed secrets: bound to their purpose, and damage is named."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm.errors import SealedStateError
from vtpm.seal.secret import seal_secret, unseal_secret

KEY = os.urandom(32)


@given(st.binary(max_size=500), st.text(max_size=50))
def test_what_was_sealed_comes_back(secret: bytes, purpose: str) -> None:
    purpose = purpose.encode(errors="replace").decode()
    sealed = seal_secret(KEY, purpose, secret)
    assert unseal_secret(KEY, purpose, sealed) == secret
    assert len(secret) < 8 or secret not in sealed


def test_the_same_is_never_sealed_twice_to_the_same() -> None:
    assert seal_secret(KEY, "a", b"secret") != seal_secret(KEY, "a", b"secret")


@pytest.mark.parametrize(("key", "purpose"), [(os.urandom(32), "a"), (KEY, "b")], ids=["key", "purpose"])
def test_another_key_or_place_is_refused(key: bytes, purpose: str) -> None:
    with pytest.raises(SealedStateError) as caught:
        unseal_secret(key, purpose, seal_secret(KEY, "a", b"secret"))
    assert caught.value.reason == "SECRET_AUTHENTICATION_FAILED"


@given(st.integers(0, 40), st.integers(1, 255))
def test_each_changed_byte_is_noticed(index: int, change: int) -> None:
    sealed = bytearray(seal_secret(KEY, "a", bytes(20)))
    sealed[index] ^= change
    with pytest.raises(SealedStateError):
        unseal_secret(KEY, "a", bytes(sealed))


@pytest.mark.parametrize("size", [0, 4, 5, 17, 32])
def test_what_is_cut_is_refused(size: int) -> None:
    with pytest.raises(SealedStateError) as caught:
        unseal_secret(KEY, "a", seal_secret(KEY, "a", b"secret")[:size])
    assert caught.value.reason in ("SECRET_FORMAT_UNKNOWN", "SECRET_AUTHENTICATION_FAILED")
