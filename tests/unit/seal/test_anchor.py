"""The anchor's content: it comes back as it was written, and nothing else is taken for one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm.errors import AnchorError
from vtpm.seal.anchor import NO_DIGEST, AnchorContent, AnchorKeys, LogPoint, Mark, dump, header_of, parse
from vtpm.seal.anchor_file import FileAnchor
from vtpm.seal.file_provider import FileKeyProvider

_u64 = st.integers(0, 2**64 - 1)
_digest = st.binary(min_size=32, max_size=32)
marks = st.builds(
    Mark, st.binary(min_size=16, max_size=16), st.sampled_from([1, 2]), _u64, _u64, _u64, _digest | st.just(NO_DIGEST)
)


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> FileKeyProvider:
    return FileKeyProvider(state_dir=tmp_path_factory.mktemp("keys"), options={}, create=True)


@pytest.fixture(scope="module")
def keys(provider: FileKeyProvider) -> AnchorKeys:
    return AnchorKeys(provider, uuid.uuid4())


def a_content(keys: AnchorKeys, *some: Mark, **changes: object) -> AnchorContent:
    values: dict[str, object] = {
        "head": LogPoint(7, b"h" * 32),
        "covered": LogPoint(6, b"c" * 32),
        "records": {mark.key: mark.pack() for mark in some},
        "update": 3,
        "time_s": 1_700_000_000,
    }
    return AnchorContent(keys.store, **{**values, **changes})  # type: ignore[arg-type]


def a_mark(version: int = 5) -> Mark:
    return Mark(b"i" * 16, 1, 2, 2, version, b"d" * 32)


@given(some=st.lists(marks, max_size=20), head=_u64, update=_u64, binding=st.binary(max_size=255))
def test_what_was_written_comes_back(keys: AnchorKeys, some: list[Mark], head: int, update: int, binding: bytes) -> None:
    content = a_content(keys, *some, head=LogPoint(head, b"h" * 32), update=update, binding=binding)
    data = dump(content, keys)
    assert parse(data, keys, "anchor") == content
    assert header_of(data, "anchor") == (keys.store, keys.wrapped)
    assert {Mark.unpack(record) for record in content.records.values()} == {Mark(*mark) for mark in content_marks(content)}


def content_marks(content: AnchorContent) -> list[Mark]:
    return [Mark.unpack(record) for record in content.records.values()]


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_bit_of_it_can_be_changed_unnoticed(keys: AnchorKeys, at: int, bit: int) -> None:
    data = bytearray(dump(a_content(keys, a_mark()), keys))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(AnchorError) as caught:
        parse(bytes(data), keys, "anchor")
    assert caught.value.reason in ("ANCHOR_DAMAGED", "ANCHOR_FORMAT_UNKNOWN")
    assert caught.value.remedy


@given(size=st.integers(0, 10_000))
def test_no_part_of_it_is_taken_for_the_whole(keys: AnchorKeys, size: int) -> None:
    data = dump(a_content(keys, a_mark()), keys)
    with pytest.raises(AnchorError):
        parse(data[: size % len(data)], keys, "anchor")


@given(data=st.binary(max_size=400) | st.binary(max_size=400).map(lambda tail: b"VTPMANC\x01" + tail))
def test_anything_else_is_refused_by_name(provider: FileKeyProvider, keys: AnchorKeys, data: bytes) -> None:
    with pytest.raises(AnchorError):
        parse(data, keys, "anchor")
    # As it comes from a file the key comes from it too.
    path = Path(provider._path).parent / "somebody's"
    path.write_bytes(data)
    with pytest.raises(AnchorError) as caught:
        FileAnchor(provider, path).read()
    assert caught.value.subject == str(path)


def test_a_count_beyond_what_is_there_is_refused_before_anything_is_made_of_it(keys: AnchorKeys) -> None:
    import hmac

    data = dump(a_content(keys, a_mark()), keys)
    end = len(data) - 32 - 73
    lie = data[: end - 4] + b"\xff\xff\xff\xff" + data[end : len(data) - 32]
    with pytest.raises(AnchorError) as caught:
        parse(lie + hmac.digest(keys.content_key, lie, "sha256"), keys, "anchor")
    assert caught.value.reason == "ANCHOR_DAMAGED"


def test_a_newer_format_is_told_from_damage(keys: AnchorKeys) -> None:
    data = dump(a_content(keys), keys)
    with pytest.raises(AnchorError) as caught:
        parse(data[:7] + b"\x02" + data[8:], keys, "anchor")
    assert caught.value.reason == "ANCHOR_FORMAT_UNKNOWN"


# ---- the file ------------------------------------------------------------------------------------------------------------


def test_a_file_anchor_keeps_the_last_content_and_its_key_survives_a_rotation(tmp_path: Path) -> None:
    provider = FileKeyProvider(state_dir=tmp_path, options={}, create=True)
    anchor = FileAnchor(provider, tmp_path / "anchor")
    assert anchor.read() is None
    store = uuid.uuid4()
    first = anchor.write(anchor.create(store))
    log_key = anchor.keys.log_key
    assert first.update == 1
    provider.begin_rotation()
    anchor.keys.rewrap()
    second = anchor.write(first)
    provider.finish_rotation()
    again = FileAnchor(FileKeyProvider(state_dir=tmp_path, options={}, create=False), tmp_path / "anchor")
    assert again.read() == second
    assert again.keys.log_key == log_key
    assert (tmp_path / "anchor").stat().st_mode & 0o777 == 0o600


def test_under_another_key_encryption_key_it_is_not_read_and_the_key_is_named(tmp_path: Path) -> None:
    provider = FileKeyProvider(state_dir=tmp_path, options={}, create=True)
    anchor = FileAnchor(provider, tmp_path / "anchor")
    anchor.write(anchor.create(uuid.uuid4()))
    (tmp_path / "keys.json").unlink()
    with pytest.raises(AnchorError) as caught:
        FileAnchor(FileKeyProvider(state_dir=tmp_path, options={}, create=True), tmp_path / "anchor").read()
    assert caught.value.reason == "ANCHOR_KEY_UNUSABLE"
    assert "KEY_UNKNOWN" in caught.value.message


@pytest.mark.parametrize("what", ["directory", "pipe", "link", "no directory", "large"])
def test_what_is_no_file_is_not_read(provider: FileKeyProvider, tmp_path: Path, what: str) -> None:
    path = tmp_path / "anchor"
    match what:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            (tmp_path / "real").write_bytes(b"x")
            path.symlink_to(tmp_path / "real")
        case "no directory":
            path = tmp_path / "not mounted" / "anchor"
        case "large":
            with path.open("wb") as file:
                file.truncate((80 << 20) + 1)
    with pytest.raises(AnchorError) as caught:
        FileAnchor(provider, path).read()
    assert caught.value.reason == ("ANCHOR_DAMAGED" if what == "large" else "ANCHOR_UNREADABLE")


def test_a_full_or_missing_volume_is_told_and_leaves_the_old_anchor(provider: FileKeyProvider, tmp_path: Path) -> None:
    anchor = FileAnchor(provider, tmp_path / "anchor")
    content = anchor.write(anchor.create(uuid.uuid4()))
    # A directory in the place of the temporary file fails as a full disk does, for root too.
    (tmp_path / ".anchor.new").mkdir()
    with pytest.raises(AnchorError) as caught:
        anchor.write(content)
    assert caught.value.reason == "ANCHOR_UNWRITABLE"
    assert anchor.read() == content
