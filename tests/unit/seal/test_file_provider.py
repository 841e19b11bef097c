"""The key file: made once, refused when others could have it, and the only thing that opens a data key."""

from __future__ import annotations

import base64
import json
import os
import stat
import traceback
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.errors import ErrorKind, KeyProviderError, SealedStateError
from vtpm.seal.file_provider import FileKeyProvider
from vtpm.seal.keys import WrappedKey, new_data_key

INSTANCE = uuid.UUID("0198c0de-0000-7000-8000-0000000000aa")
OTHER_INSTANCE = uuid.UUID("0198c0de-0000-7000-8000-0000000000bb")
KEY = new_data_key()


def opened(directory: Path, *, create: bool = False, **options: str) -> FileKeyProvider:
    return FileKeyProvider(state_dir=directory, options=options, create=create)


@pytest.fixture
def provider(tmp_path: Path) -> FileKeyProvider:
    return opened(tmp_path, create=True)


@pytest.fixture
def key_file(tmp_path: Path, provider: FileKeyProvider) -> Path:
    return tmp_path / "keys.json"


def refusal(path: Path) -> KeyProviderError:
    """Open the key file, which must be refused and stay as it is."""
    with pytest.raises(KeyProviderError) as refused:
        opened(path.parent, path=str(path), create=True)
    assert (refused.value.subject, refused.value.kind) == (str(path), ErrorKind.FAILED_PRECONDITION)
    assert refused.value.remedy
    return refused.value


def rewritten(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


# ---- the file ------------------------------------------------------------------------------------------------------------


def test_the_first_start_makes_a_key_file_that_only_its_user_can_read(key_file: Path) -> None:
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert key_file.stat().st_uid == os.geteuid()
    assert [file.name for file in key_file.parent.iterdir()] == ["keys.json"]


def test_two_hosts_have_different_keys(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = opened(tmp_path / "a", create=True), opened(tmp_path / "b", create=True)
    assert first.key_id != second.key_id
    assert (tmp_path / "a" / "keys.json").read_bytes() != (tmp_path / "b" / "keys.json").read_bytes()


def test_the_next_start_reads_the_same_key_and_writes_nothing(provider: FileKeyProvider, key_file: Path) -> None:
    before = key_file.read_bytes()
    wrapped = provider.wrap(KEY, INSTANCE)
    again = opened(key_file.parent, create=True)
    assert again.key_id == provider.key_id
    assert again.unwrap(wrapped, INSTANCE) == KEY
    assert key_file.read_bytes() == before


def test_a_missing_file_is_not_replaced_while_state_is_sealed_under_it(tmp_path: Path) -> None:
    with pytest.raises(KeyProviderError) as refused:
        opened(tmp_path, create=False)
    assert refused.value.reason == "KEY_FILE_MISSING"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o660, 0o666])
def test_a_key_file_that_others_may_touch_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    refused = refusal(key_file)
    assert refused.reason == "KEY_FILE_MODE"
    assert f"{mode:04o}" in refused.message
    assert "chmod 0600" in refused.remedy


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_file_of_its_user_alone_is_fine(provider: FileKeyProvider, key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    assert opened(key_file.parent).key_id == provider.key_id


def test_a_key_file_of_another_user_is_refused(key_file: Path) -> None:
    if os.geteuid() == 0:
        os.chown(key_file, 65534, 65534)
        foreign = key_file
    else:
        foreign = Path("/etc/passwd")
    refused = refusal(foreign)
    assert refused.reason == "KEY_FILE_OWNER"
    assert str(foreign.stat().st_uid) in refused.message


def test_a_symlink_is_not_followed(key_file: Path) -> None:
    link = key_file.with_name("link.json")
    link.symlink_to(key_file)
    assert refusal(link).reason == "KEY_FILE_UNUSABLE"


def test_a_symlink_to_nothing_is_not_taken_for_a_missing_file(tmp_path: Path) -> None:
    link = tmp_path / "keys.json"
    link.symlink_to(tmp_path / "planted.json")
    assert refusal(link).reason == "KEY_FILE_UNUSABLE"
    assert not (tmp_path / "planted.json").exists()


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyProviderError) as refused:
        opened(tmp_path / "no" / "such", create=True)
    assert (refused.value.reason, refused.value.subject) == ("KEY_FILE_UNUSABLE", str(tmp_path / "no" / "such" / "keys.json"))


def test_an_unknown_option_is_refused_before_a_key_is_made(tmp_path: Path) -> None:
    with pytest.raises(KeyProviderError, match="passphrase") as refused:
        opened(tmp_path, create=True, passphrase="x")
    assert refused.value.reason == "KEY_PROVIDER_OPTION_UNKNOWN"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_a_key_of_the_wrong_length_is_refused(provider: FileKeyProvider, key_file: Path, size: int) -> None:
    rewritten(key_file, keys={provider.key_id: base64.b64encode(bytes(size)).decode()})
    assert refusal(key_file).reason == "KEY_FILE_DAMAGED"


@pytest.mark.parametrize(
    "changes",
    [
        {"current": "file-of-nobody"},
        {"keys": {}},
        {"keys": []},
        {"keys": {"a": 1}},
        {"keys": {"a": "not base64!"}},
        {"keys": None},
    ],
)
def test_a_key_file_that_does_not_fit_together_is_damaged(key_file: Path, changes: dict[str, Any]) -> None:
    rewritten(key_file, **changes)
    assert refusal(key_file).reason == "KEY_FILE_DAMAGED"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b"{" * 100, b" " * 70_000])
def test_a_file_that_holds_no_keys_is_damaged_and_not_overwritten(key_file: Path, content: bytes) -> None:
    key_file.write_bytes(content)
    assert refusal(key_file).reason == "KEY_FILE_DAMAGED"
    assert key_file.read_bytes() == content


@pytest.mark.parametrize("form", [0, 2, "1", None])
def test_a_key_file_of_an_unknown_format_is_refused_by_name(key_file: Path, form: object) -> None:
    rewritten(key_file, format=form)
    assert refusal(key_file).reason == "KEY_FILE_FORMAT_UNKNOWN"


def test_every_cut_of_the_key_file_is_damage(key_file: Path) -> None:
    whole = key_file.read_bytes()
    for size in range(len(whole)):
        key_file.write_bytes(whole[:size])
        assert refusal(key_file).reason == "KEY_FILE_DAMAGED"


# ---- wrapping ------------------------------------------------------------------------------------------------------------


def test_a_wrapped_key_opens_for_its_instance(provider: FileKeyProvider) -> None:
    wrapped = provider.wrap(KEY, INSTANCE)
    assert (wrapped.provider, wrapped.key_id) == ("file", provider.key_id)
    assert KEY not in wrapped.blob
    assert provider.unwrap(wrapped, INSTANCE) == KEY
    assert provider.wrap(KEY, INSTANCE).blob != wrapped.blob


def test_a_wrapped_key_moved_to_another_instance_is_refused_by_name(provider: FileKeyProvider) -> None:
    with pytest.raises(SealedStateError) as refused:
        provider.unwrap(provider.wrap(KEY, INSTANCE), OTHER_INSTANCE)
    assert (refused.value.reason, refused.value.subject) == ("DATA_KEY_AUTHENTICATION_FAILED", str(OTHER_INSTANCE))


@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_wrapped_key_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    provider = opened(tmp_path_factory.getbasetemp(), create=True)
    blob = provider.wrap(KEY, INSTANCE).blob
    flipped = bytearray(blob)
    flipped[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = blob[: data.draw(st.integers(0, len(blob) - 1))]
    for damaged in (bytes(flipped), cut, blob + b"\0"):
        with pytest.raises(SealedStateError) as refused:
            provider.unwrap(WrappedKey("file", provider.key_id, damaged), INSTANCE)
        assert refused.value.reason == "DATA_KEY_AUTHENTICATION_FAILED"


def test_a_key_wrapped_under_another_key_file_names_the_key_that_is_missing(provider: FileKeyProvider, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    wrapped = opened(tmp_path / "other", create=True).wrap(KEY, INSTANCE)
    with pytest.raises(KeyProviderError, match=wrapped.key_id) as refused:
        provider.unwrap(wrapped, INSTANCE)
    assert refused.value.reason == "KEY_UNKNOWN"


def test_a_key_wrapped_by_another_provider_is_refused_with_the_setting_to_change(provider: FileKeyProvider) -> None:
    with pytest.raises(KeyProviderError) as refused:
        provider.unwrap(WrappedKey("pkcs11", provider.key_id, provider.wrap(KEY, INSTANCE).blob), INSTANCE)
    assert (refused.value.reason, refused.value.remedy) == ("KEY_PROVIDER_MISMATCH", "set key_provider to pkcs11")


def test_no_key_is_shown_by_the_provider_or_its_refusals(provider: FileKeyProvider, key_file: Path) -> None:
    (encoded,) = json.loads(key_file.read_bytes())["keys"].values()
    secrets = {encoded, base64.b64decode(encoded).hex(), repr(base64.b64decode(encoded))[2:-1], KEY.hex(), repr(KEY)[2:-1]}
    with pytest.raises(SealedStateError) as moved:
        provider.unwrap(provider.wrap(KEY, INSTANCE), OTHER_INSTANCE)
    rewritten(key_file, keys={provider.key_id: encoded + "!"})
    shown = repr(provider) + "".join(
        "".join(traceback.format_exception(error)) + repr(error) for error in (moved.value, refusal(key_file))
    )
    assert [secret for secret in secrets if secret in shown] == []


def _pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("make", [Path.mkdir, _pipe])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "keys.json")
    with pytest.raises(KeyProviderError) as refused:
        opened(tmp_path)
    assert refused.value.reason == "KEY_FILE_UNUSABLE"


@pytest.mark.parametrize(
    "content", ['{"format":1,"current":[],"keys":{}}', "[" * 50_000, '{"format":1,"current":"x","keys":[]}']
)
def test_content_of_a_strange_shape_is_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys.json").write_text(content)
    (tmp_path / "keys.json").chmod(0o600)
    with pytest.raises(KeyProviderError) as refused:
        opened(tmp_path)
    assert refused.value.reason == "KEY_FILE_DAMAGED"
