"""Data keys, and finding the provider that wraps them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtpm.errors import ConfigError, KeyProviderError
from vtpm.seal.file_provider import FileKeyProvider
from vtpm.seal.keys import DATA_KEY_SIZE, WrappedKey, load_key_provider, new_data_key


def test_a_data_key_is_fresh_and_has_256_bits() -> None:
    keys = {new_data_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {DATA_KEY_SIZE} == {32}


def test_a_wrapped_key_does_not_show_its_bytes() -> None:
    wrapped = WrappedKey("file", "file-1", b"sixteen wrapped!")
    assert repr(wrapped) == "WrappedKey(provider='file', key_id='file-1')"


def test_the_provider_is_found_by_its_name(tmp_path: Path) -> None:
    provider = load_key_provider("file", state_dir=tmp_path, options={}, create=True)
    assert isinstance(provider, FileKeyProvider)
    assert provider.name == "file"


def test_options_reach_the_provider(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.json"
    load_key_provider("file", state_dir=tmp_path, options={"path": str(path)}, create=True)
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere.json"]


def test_a_provider_that_is_not_installed_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="installed: file") as refused:
        load_key_provider("kms-of-mars", state_dir=tmp_path, options={}, create=True)
    assert (refused.value.reason, refused.value.subject) == ("KEY_PROVIDER_UNKNOWN", "key_provider")
    assert list(tmp_path.iterdir()) == []


def test_a_provider_without_its_key_refuses_to_make_one_when_state_is_sealed_already(tmp_path: Path) -> None:
    with pytest.raises(KeyProviderError) as refused:
        load_key_provider("file", state_dir=tmp_path, options={}, create=False)
    assert refused.value.reason == "KEY_FILE_MISSING"
    assert list(tmp_path.iterdir()) == []
