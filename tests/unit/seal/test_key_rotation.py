"""Rotation of the key-encryption key: both open while it goes on, only the new one after it."""

from __future__ import annotations

import json
import stat
import uuid
from pathlib import Path

import pytest

from vtpm.errors import KeyProviderError
from vtpm.seal.file_provider import FileKeyProvider
from vtpm.seal.keys import new_data_key

INSTANCE = uuid.UUID("0198c0de-0000-7000-8000-0000000000aa")
KEY = new_data_key()


def opened(directory: Path) -> FileKeyProvider:
    return FileKeyProvider(state_dir=directory, options={}, create=True)


@pytest.fixture
def provider(tmp_path: Path) -> FileKeyProvider:
    return opened(tmp_path)


def test_what_was_wrapped_before_a_rotation_still_opens_during_it(provider: FileKeyProvider, tmp_path: Path) -> None:
    old = provider.wrap(KEY, INSTANCE)
    assert provider.begin_rotation() == provider.key_id != old.key_id
    new = provider.wrap(KEY, INSTANCE)
    assert new.key_id == provider.key_id
    for reader in (provider, opened(tmp_path)):
        assert reader.unwrap(old, INSTANCE) == reader.unwrap(new, INSTANCE) == KEY


def test_after_a_rotation_the_old_key_is_gone(provider: FileKeyProvider, tmp_path: Path) -> None:
    old = provider.wrap(KEY, INSTANCE)
    old_file = json.loads((tmp_path / "keys.json").read_bytes())
    provider.begin_rotation()
    new = provider.wrap(KEY, INSTANCE)
    provider.finish_rotation()

    for reader in (provider, opened(tmp_path)):
        assert reader.unwrap(new, INSTANCE) == KEY
        with pytest.raises(KeyProviderError) as refused:
            reader.unwrap(old, INSTANCE)
        assert refused.value.reason == "KEY_UNKNOWN"
    assert old_file["keys"][old.key_id] not in (tmp_path / "keys.json").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]


def test_a_rotated_key_has_other_bytes(provider: FileKeyProvider, tmp_path: Path) -> None:
    provider.begin_rotation()
    keys = json.loads((tmp_path / "keys.json").read_bytes())["keys"]
    assert len(keys) == len(set(keys.values())) == 2


def test_an_interrupted_rotation_goes_on_with_the_key_that_it_added(provider: FileKeyProvider, tmp_path: Path) -> None:
    added = provider.begin_rotation()
    restarted = opened(tmp_path)
    assert restarted.key_id == added
    assert restarted.begin_rotation() == added
    assert len(json.loads((tmp_path / "keys.json").read_bytes())["keys"]) == 2
    restarted.finish_rotation()
    assert restarted.begin_rotation() != added


def test_a_rotated_file_is_still_its_users_alone(provider: FileKeyProvider, tmp_path: Path) -> None:
    provider.begin_rotation()
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600
    provider.finish_rotation()
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600


def test_a_symlink_planted_where_the_new_file_is_written_is_replaced_and_not_followed(
    provider: FileKeyProvider, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / ".keys.json.new").symlink_to(victim)
    provider.begin_rotation()
    assert victim.read_text() == "untouched"
    assert opened(tmp_path).key_id == provider.key_id


def test_a_rotation_that_cannot_be_written_leaves_the_old_key_in_use(provider: FileKeyProvider, tmp_path: Path) -> None:
    before, old_id = (tmp_path / "keys.json").read_bytes(), provider.key_id
    # Something that no unlink takes away stands where the new file would be written.
    (tmp_path / ".keys.json.new").mkdir()
    with pytest.raises(KeyProviderError) as refused:
        provider.begin_rotation()
    assert refused.value.reason == "KEY_FILE_UNUSABLE"
    assert provider.key_id == old_id == provider.wrap(KEY, INSTANCE).key_id
    assert (tmp_path / "keys.json").read_bytes() == before
