"""The careful opener: nothing by a stranger's link, nothing that is no regular file, nothing without a bound."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.strangers import KINDS, STRANGER, Victim, a_device, a_place, needs_root
from vtpm import files
from vtpm.files import UnsafePathError

LIMIT = 100


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    return Victim.of(tmp_path / "victim")


# ---- what lies in a file's place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_read_and_nothing_is_waited_for(kind: str, tmp_path: Path, victim: Victim) -> None:
    KINDS[kind](tmp_path / "x", victim.path)
    with pytest.raises(OSError, match=r"no regular file|symbolic link"):
        files.read(tmp_path / "x", LIMIT)
    assert victim.is_untouched()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replaces", [True, False])
def test_only_a_regular_file_is_replaced(kind: str, replaces: bool, tmp_path: Path, victim: Victim) -> None:
    KINDS[kind](tmp_path / "x", victim.path)
    before = os.lstat(tmp_path / "x")
    with pytest.raises(OSError, match=r"no regular file|symbolic link"):
        files.replace(tmp_path / "x", b"data", replaces=replaces)
    assert os.lstat(tmp_path / "x").st_ino == before.st_ino
    assert sorted(item.name for item in tmp_path.iterdir()) == ["victim", "x"], "no half of a file is left"
    assert victim.is_untouched()


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_in_the_temporary_files_place_is_not_written_into(kind: str, tmp_path: Path, victim: Victim) -> None:
    KINDS[kind](tmp_path / ".x.new", victim.path)
    if kind == "a directory":
        with pytest.raises(OSError, match="directory"):
            files.replace(tmp_path / "x", b"data", temporary=".x.new")
    else:
        files.replace(tmp_path / "x", b"data", temporary=".x.new")
        assert (tmp_path / "x").read_bytes() == b"data"
    assert victim.is_untouched()


@needs_root
def test_a_device_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    device = a_device(tmp_path / "zero")
    for act in (lambda path: files.read(path, LIMIT), lambda path: files.replace(path, b"data")):
        with pytest.raises(OSError, match="no regular file"):
            act(device)
    assert device.is_char_device()


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 100 bytes") as refused:
        files.read(tmp_path / "huge", LIMIT)
    assert refused.value.errno == errno.EFBIG
    (tmp_path / "fits").write_bytes(b"x" * LIMIT)
    assert files.read(tmp_path / "fits", LIMIT) == b"x" * LIMIT


def test_a_pipe_comes_by_a_descriptor_of_this_process_only(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"by a pipe")
    os.close(writer)
    assert files.read(Path(f"/dev/fd/{reader}"), LIMIT, follow=True) == b"by a pipe"
    os.close(reader)
    script = "from pathlib import Path; from vtpm import files; print(files.read(Path('/dev/stdin'), 9, follow=True))"
    done = subprocess.run([sys.executable, "-c", script], input=b"by a pipe", capture_output=True, check=True)
    assert done.stdout == b"b'by a pipe'\n"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        files.read(tmp_path / "pipe", LIMIT, follow=True)


def test_a_file_is_replaced_with_its_mode_and_a_link_to_the_old_one_keeps_the_old(tmp_path: Path) -> None:
    path, other = tmp_path / "x y", tmp_path / "other"
    path.write_bytes(b"old")
    other.hardlink_to(path)
    files.replace(path, b"new", mode=0o640)
    assert (path.read_bytes(), other.read_bytes()) == (b"new", b"old")
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileExistsError):
        files.replace(path, b"newer", replaces=False)
    assert path.read_bytes() == b"new"


def test_what_fails_halfway_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def fail(fd: int) -> None:
        os.write(fd, b"ne")
        raise OSError(errno.ENOSPC, "the disk is full")

    with files.open_directory(tmp_path) as directory, pytest.raises(OSError, match="full"):
        directory.put("x", fail)
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("x", b"old")]


# ---- links ---------------------------------------------------------------------------------------------------------------


def test_a_link_of_ones_own_is_followed_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"data")
    (tmp_path / "dir").symlink_to("real")
    (tmp_path / "real" / "again").symlink_to("../dir/../dir/x")
    assert files.read(tmp_path / "dir" / "x", LIMIT) == b"data", "a directory's link"
    assert files.read(tmp_path / "dir" / "again", LIMIT, follow=True) == b"data"
    with pytest.raises(OSError, match="symbolic link"):
        files.read(tmp_path / "dir" / "again", LIMIT)


def test_links_in_a_ring_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="too many symbolic links"):
        files.read(tmp_path / "a", LIMIT, follow=True)


@needs_root
@pytest.mark.parametrize("follow", [True, False])
def test_a_link_of_a_stranger_is_never_followed(follow: bool, tmp_path: Path, victim: Victim) -> None:
    with a_place(STRANGER) as place:
        (place / "dir").symlink_to(tmp_path)
        (place / "x").symlink_to(victim.path)
        for link in ("dir", "x"):
            os.chown(place / link, STRANGER, STRANGER, follow_symlinks=False)
        for name in ("dir/victim", "x"):
            with pytest.raises(OSError, match="symbolic link"):
                files.read(place / name, LIMIT, follow=follow)
        with pytest.raises(UnsafePathError, match="symbolic link of uid 65534") as refused:
            files.replace(place / "dir" / "new", b"data")
        assert refused.value.remedy
    assert victim.is_untouched()
    assert not (tmp_path / "new").exists()


# ---- whose directory it is -----------------------------------------------------------------------------------------------


@needs_root
def test_a_directory_of_a_stranger_is_not_trusted_wherever_it_is_on_the_way(tmp_path: Path) -> None:
    with a_place(STRANGER) as place:
        ours = place / "ours"
        ours.mkdir(0o700)
        (ours / "x").write_bytes(b"data")
        assert files.read(ours / "x", LIMIT) == b"data", "it may be used, as long as nothing rests on it"
        for path in (ours / "x", ours / "not there", ours / "no" / "such" / "file", place):
            with pytest.raises(UnsafePathError, match="belongs to uid 65534"):
                files.check_parents(path / "y")
        (tmp_path / "link").symlink_to(ours)
        with pytest.raises(UnsafePathError, match="belongs to uid 65534"):
            files.read(tmp_path / "link" / "x", LIMIT, trusted=True)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_may_write_to_is_not_trusted(mode: int) -> None:
    with a_place(mode=mode) as place:
        with pytest.raises(UnsafePathError, match="can be written by others") as refused:
            files.check_parents(place / "x")
        assert refused.value.remedy == f"chmod go-w '{place}', or use another directory"
        place.chmod(mode | 0o1000)
        files.check_parents(place / "x")


@needs_root
def test_in_a_sticky_directory_only_what_is_ours_is_trusted() -> None:
    with a_place(mode=0o1777) as place:
        for owner in (STRANGER, 0):
            (place / str(owner)).mkdir(0o755)
            os.chown(place / str(owner), owner, owner)
        files.check_parents(place / "0" / "x")
        with pytest.raises(UnsafePathError, match="belongs to uid"):
            files.check_parents(place / str(STRANGER) / "x")


@needs_root
def test_root_may_have_given_a_directory_to_the_user_of_a_service() -> None:
    with a_place(STRANGER) as place:
        files.check_parents(place / "x", service=True)
        with pytest.raises(UnsafePathError):
            files.check_parents(place / "x")
        other = place / "other"
        other.mkdir()
        os.chown(other, STRANGER + 1, STRANGER + 1)
        with pytest.raises(UnsafePathError, match="belongs to uid 65535"):
            files.check_parents(other / "x", service=True)
        place.parent.chmod(0o1777)
        with pytest.raises(UnsafePathError, match="belongs to uid 65534"):
            files.check_parents(place / "x", service=True)


@needs_root
def test_a_file_of_a_stranger_or_one_that_others_may_write_to_is_not_owned(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"data")
    assert files.read(path, LIMIT, owned=True) == b"data"
    path.chmod(0o666)
    with pytest.raises(UnsafePathError, match="can be written by others"):
        files.read(path, LIMIT, owned=True)
    path.chmod(0o600)
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(UnsafePathError, match="belongs to uid 65534"):
        files.read(path, LIMIT, owned=True)


def test_directories_are_made_for_us_alone(tmp_path: Path) -> None:
    files.open_directory(tmp_path / "a b" / "c", make=0o700).close()
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a b", "a b/c")] == [0o700, 0o700]


# ---- a socket's mode and owner -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"a socket"}))
def test_mode_and_owner_go_to_the_socket_that_was_made_and_to_nothing_else(kind: str, tmp_path: Path, victim: Victim) -> None:
    KINDS[kind](tmp_path / "x", victim.path)
    before = os.lstat(tmp_path / "x").st_mode
    with files.open_directory(tmp_path) as directory, pytest.raises(OSError, match="not the socket"):
        directory.give_socket("x", 0o777, gid=1)
    assert os.lstat(tmp_path / "x").st_mode == before
    assert victim.is_untouched()


def test_a_socket_gets_its_mode(tmp_path: Path, victim: Victim) -> None:
    KINDS["a socket"](tmp_path / "x", victim.path)
    with files.open_directory(tmp_path) as directory:
        os.close(directory.give_socket("x", 0o660, gid=os.getegid()))
    assert os.lstat(tmp_path / "x").st_mode & 0o777 == 0o660
