"""What workers say is text of one line each, bounded, under their own names; a log that can't be written holds nobody up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vtpm.engine.host_log import open_log
from vtpm.engine.log_pipes import WorkerLogs, WorkerOutput, make_pipe

NAME = "worker web-1"
LINES = 100
BYTES = 16 << 10


def said(pieces: list[bytes]) -> list[str]:
    """What becomes of what a worker writes, and then ends."""
    heard: list[str] = []
    reader, writer = make_pipe()
    output = WorkerOutput(reader, lambda: NAME, heard.append)
    for piece in pieces:
        os.write(writer, piece)
        output.read(0.0)
    os.close(writer)
    output.end()
    return heard


@given(st.lists(st.binary(min_size=1, max_size=2000), max_size=60))
def test_whatever_a_worker_writes_is_bounded_printable_lines_of_its_own(pieces: list[bytes]) -> None:
    heard = said(pieces)
    for line in heard:
        assert line.startswith(f"{NAME}: ")
        assert line.isascii()
        assert line.isprintable()
        assert len(line) <= len(NAME) + 4 * 512 + 16
    everything = b"".join(pieces)
    written = everything.count(b"\n") + (not everything.endswith(b"\n") and bool(everything))
    withheld = int(heard[-1].split()[2]) if heard and "more lines withheld" in heard[-1] else 0
    assert len(heard) - (withheld > 0) + withheld == written


def test_a_line_that_comes_in_pieces_is_one_and_the_last_needs_no_end() -> None:
    assert said([b"one", b" line\nanother", b" line"]) == [f"{NAME}: one line", f"{NAME}: another line"]


def test_control_characters_are_escaped_and_a_long_line_is_cut() -> None:
    assert said([b"\x1b[31m\xe2\x80\xae\n" + b"y" * 600]) == [
        f"{NAME}: \\x1b[31m\\xe2\\x80\\xae",
        f"{NAME}: {'y' * 512} (cut)",
    ]


def test_what_is_more_than_its_share_is_withheld_and_counted() -> None:
    heard = said([b"%d\n" % number for number in range(LINES + 50)])
    assert len(heard) == LINES + 1
    assert heard[-1] == f"{NAME}: 50 more lines withheld, and what it said when its pipe was full"
    long = said([b"z" * 500 + b"\n" for _ in range(LINES)])
    assert sum(len(line) for line in long[:-1]) <= BYTES + LINES * (len(NAME) + 2)
    assert "more lines withheld" in long[-1]


def test_a_new_window_brings_a_new_share() -> None:
    heard: list[str] = []
    reader, writer = make_pipe()
    output = WorkerOutput(reader, lambda: NAME, heard.append)
    for now in (0.0, 1.0, 4000.0):
        os.write(writer, b"x\n" * 90)
        output.read(now)
    assert [line for line in heard if "withheld" in line] == [
        f"{NAME}: 80 more lines withheld, and what it said when its pipe was full"
    ]
    assert len(heard) == LINES + 1 + 90
    os.close(writer)
    output.end()


def test_one_that_floods_its_pipe_is_looked_at_now_and_then_and_the_others_at_once() -> None:
    watched: dict[int, Callable[[], None]] = {}
    heard: list[str] = []
    (loud, loud_end), (quiet, quiet_end) = make_pipe(), make_pipe()

    def unwatch(fd: int) -> None:
        watched.pop(fd, None)

    logs = WorkerLogs(heard.append, watched.__setitem__, unwatch)
    logs.listen(loud, lambda: "loud")
    logs.listen(quiet, lambda: "quiet")
    assert logs.pause_s == -1
    os.write(loud_end, b"\n" * 4000)
    watched[loud]()
    assert set(watched) == {quiet}
    assert 0 <= logs.pause_s <= 1
    os.write(quiet_end, b"hello\n")
    watched[quiet]()
    assert heard[-1] == "quiet: hello"
    assert quiet in watched
    for end in (loud_end, quiet_end):
        os.close(end)
    logs.end(loud)
    assert heard[-1].startswith("loud: 3900 more lines withheld")
    assert logs.pause_s == -1
    logs.end(quiet)
    assert not watched


def test_one_whose_line_never_ends_is_looked_at_now_and_then_too() -> None:
    heard: list[str] = []
    reader, writer = make_pipe()
    output = WorkerOutput(reader, lambda: NAME, heard.append)
    modest, turns = True, 0
    while modest:
        os.write(writer, b"y" * 4000)
        more, modest = output.read(0.0)
        assert more
        turns += 1
        assert turns < 100, "the loop that reads it would never rest"
    # In another window it has another share.
    os.write(writer, b"y" * 4000)
    assert output.read(4000.0) == (True, True)
    os.close(writer)
    output.end()
    assert heard == [f"{NAME}: {'y' * 512} (cut)"]


def in_a_process(code: str, log: Path) -> subprocess.CompletedProcess[bytes]:
    """Run Python with the log as standard error."""
    fd = open_log(log)
    try:
        head = "from pathlib import Path\nfrom vtpm.engine.host_log import HostLog\n"
        head += f"log = HostLog(Path({str(log)!r}), max_size=2000)\n"
        return subprocess.run([sys.executable, "-c", head + code], stderr=fd, stdout=subprocess.PIPE, check=False, timeout=60)
    finally:
        os.close(fd)


def test_a_log_of_its_size_is_kept_once_and_begun_anew(tmp_path: Path) -> None:
    log = tmp_path / "engine-host.log"
    done = in_a_process("for number in range(500): log.say(f'line {number}')", log)
    assert done.returncode == 0
    kept = log.with_name("engine-host.log.1")
    assert 0 < log.stat().st_size <= 2000
    assert 0 < kept.stat().st_size <= 2000
    assert log.read_text().splitlines()[-1].endswith("line 499")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine-host.log", "engine-host.log.1"]


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    code = """
import resource
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
# Nothing can be written, as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
for _ in range(3):
    log.say("lost")
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
log.say("kept")
"""
    log = tmp_path / "engine-host.log"
    assert in_a_process(code, log).returncode == 0
    (line,) = log.read_text().splitlines()
    assert line.endswith("3 lines could not be written before this one; kept")


def test_only_a_file_is_a_log(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "/dev/null", "no/such/directory"):
        try:
            os.close(open_log(tmp_path / name))
        except OSError:
            continue
        raise AssertionError(name)
    os.close(open_log(tmp_path / "log"))
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
