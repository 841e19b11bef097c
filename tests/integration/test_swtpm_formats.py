"""swtpm's files and its control protocol, as we read and write them, with swtpm itself on the other side."""

from __future__ import annotations

import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.exchange import (
    KEY_256,
    PERMALL,
    RUNNING,
    Swtpm,
    furnish,
    furniture,
    of_swtpm,
)
from vtpm.cli.exchange import put_state, take_state
from vtpm.cli.swtpm_files import KeySource, read_state
from vtpm.errors import EngineError, SealedStateError, UnavailableError
from vtpm.tpm.ptm import INIT_DELETE_VOLATILE, BlobType, Result, migration_blob
from vtpm.wire import swtpm_state
from vtpm.wire.control_client import ControlClient, ControlCommandError
from vtpm.wire.swtpm_keys import Kdf, KeyFormat, KeyMode

pytestmark = pytest.mark.skipif(not shutil.which("swtpm"), reason="swtpm is not installed")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Where the tools keep their files."""
    path = tmp_path / "files"
    path.mkdir()
    return path


KEYS: Sequence[tuple[str, bytes, str, KeySource, KeyMode]] = [
    ("hex 128", b"0x" + KEY_256[:16].hex().encode() + b"\n", "file={},mode=aes-128-cbc", KeySource(), KeyMode.AES_128_CBC),
    ("hex 256", KEY_256.hex().encode(), "file={},mode=aes-256-cbc,format=hex", KeySource(), KeyMode.AES_256_CBC),
    (
        "binary 256",
        KEY_256,
        "file={},mode=aes-256-cbc,format=binary",
        KeySource(key_format=KeyFormat.BINARY),
        KeyMode.AES_256_CBC,
    ),
    (
        "binary 128, called 256",
        KEY_256[:16],
        "file={},mode=aes-256-cbc,format=binary",
        KeySource(key_format=KeyFormat.BINARY),
        KeyMode.AES_128_CBC,
    ),
    ("pbkdf2 256", b"a password\n", "pwdfile={},mode=aes-256-cbc", KeySource(), KeyMode.AES_256_CBC),
    ("pbkdf2 128", b"a password", "pwdfile={},mode=aes-cbc,kdf=pbkdf2", KeySource(), KeyMode.AES_128_CBC),
    (
        "sha512 256",
        b"a password of more than thirty-two octets",
        "pwdfile={},mode=aes-256-cbc,kdf=sha512",
        KeySource(kdf=Kdf.SHA512),
        KeyMode.AES_256_CBC,
    ),
]


@pytest.mark.parametrize(("content", "option", "source", "mode"), [item[1:] for item in KEYS], ids=[item[0] for item in KEYS])
def test_what_swtpm_encrypts_is_read_and_what_is_built_swtpm_reads(
    tmp_path: Path, files: Path, content: bytes, option: str, source: KeySource, mode: KeyMode
) -> None:
    key_path, state = tmp_path / "key", tmp_path / "state"
    key_path.write_bytes(content)
    option = option.format(key_path)
    name = {"key_file": key_path} if option.startswith("file") else {"password_file": key_path}
    source = KeySource(**name, key_format=source.key_format, kdf=source.kdf)
    before = of_swtpm(state, files, "--key", option, action=furnish)
    written = (state / PERMALL).read_bytes()
    assert swtpm_state.mode_of(written) is mode
    payload = read_state(state / PERMALL, source, None)
    swtpm_state.check_permanent(payload)
    assert before["nv"] in payload
    assert len(swtpm_state.build(payload, source.read(mode))) == len(written)

    again = tmp_path / "again"
    again.mkdir()
    (again / PERMALL).write_bytes(swtpm_state.build(payload, source.read(mode)))
    assert of_swtpm(again, files, "--key", option, action=furniture) == before


def test_a_plain_file_is_written_byte_for_byte_as_swtpm_writes_it(tmp_path: Path, files: Path) -> None:
    of_swtpm(tmp_path / "state", files, action=furnish)
    written = (tmp_path / "state" / PERMALL).read_bytes()
    assert swtpm_state.build(swtpm_state.parse(written)) == written


# ---- the client of the control protocol ----------------------------------------------------------------------------------


def test_state_blobs_carry_a_tpm_from_one_swtpm_into_another(tmp_path: Path, files: Path) -> None:
    with Swtpm(tmp_path / "old", *RUNNING) as old:
        before = furnish(lambda *command: old.tool(*command, cwd=files), files)
        with ControlClient(old.control) as control:
            assert control.get_capability() & 0x378F == 0x378F
            blob = control.get_state_blob(BlobType.PERMANENT)
            volatile = control.get_state_blob(BlobType.VOLATILE)
            assert control.get_state_blob(BlobType.SAVESTATE) is None
    assert blob is not None
    assert volatile is not None
    payload = swtpm_state.payload_of(blob)
    swtpm_state.check_permanent(payload)
    assert migration_blob(payload) == blob
    assert migration_blob(swtpm_state.payload_of(volatile)) == volatile
    with Swtpm(tmp_path / "new") as new:
        with ControlClient(new.control) as control:
            control.stop()
            control.set_state_blob(BlobType.PERMANENT, blob)
            control.set_state_blob(BlobType.VOLATILE, volatile)
            control.init(INIT_DELETE_VOLATILE)
        # With its volatile state the TPM is already started.
        assert furniture(lambda *command: new.tool(*command, cwd=files), files) == before


def test_a_refused_command_says_its_result_and_the_connection_goes_on(tmp_path: Path) -> None:
    with Swtpm(tmp_path / "state") as swtpm, ControlClient(swtpm.control) as control:
        # swtpm 0.7 gives no state before INIT, and can't lock.
        with pytest.raises(ControlCommandError) as caught:
            control.get_state_blob(BlobType.PERMANENT)
        assert caught.value.result == Result.BAD_ORDINAL
        with pytest.raises(ControlCommandError) as caught:
            control.lock_storage(1)
        assert caught.value.result == Result.BAD_ORDINAL
        control.init()
        assert control.get_state_blob(BlobType.PERMANENT)
        with pytest.raises(ControlCommandError):
            control.set_state_blob(BlobType.PERMANENT, b"while it runs")
        control.stop()
        with pytest.raises(ControlCommandError):
            control.set_state_blob(BlobType.PERMANENT, b"no state")
        assert control.get_capability()


def test_nobody_at_the_socket_is_said_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        ControlClient(tmp_path / "nobody")
    assert caught.value.reason == "CONTROL_SOCKET_UNREACHABLE"
    with pytest.raises(UnavailableError) as caught:
        ControlClient("/" + "x" * 200)
    assert caught.value.reason == "CONTROL_SOCKET_UNREACHABLE"


@pytest.fixture
def answering() -> Iterator[Callable[..., Path]]:
    """Give a control socket whose server answers each request with the next of some byte strings, then hangs up."""
    directory = Path(tempfile.mkdtemp(prefix="ctrl-"))
    path = directory / "ctrl"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve(*answers: bytes) -> Path:
        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    connection.recv(4096)
                    for byte in answer:
                        connection.send(bytes([byte]))

        threading.Thread(target=run, daemon=True).start()
        return path

    yield serve
    listener.close()
    shutil.rmtree(directory)


def test_a_long_blob_comes_in_parts(answering: Callable[..., Path]) -> None:
    parts = [struct.pack(">IIII", 0, 0, 7, 3) + b"abc", struct.pack(">IIII", 0, 0, 4, 3) + b"def"]
    parts.append(struct.pack(">IIII", 0, 0, 1, 1) + b"g")
    with ControlClient(answering(*parts)) as control:
        assert control.get_state_blob(BlobType.PERMANENT) == b"abcdefg"


@pytest.mark.parametrize(
    "answer",
    [(1 << 30, 16), (16, 17), (16, 0), (0, 0), (0, 16)],
    ids=["huge", "more than all", "endless", "empty", "more than nothing"],
)
def test_impossible_sizes_are_not_believed(answering: Callable[..., Path], answer: tuple[int, int]) -> None:
    with ControlClient(answering(struct.pack(">IIII", 0, 0, *answer))) as control, pytest.raises(EngineError) as caught:
        control.get_state_blob(BlobType.PERMANENT)
    assert caught.value.reason == "CONTROL_ANSWER_INVALID"


@pytest.mark.parametrize("answer", [b"", b"\0\0", struct.pack(">IIII", 0, 0, 16, 16) + b"half"])
def test_a_connection_that_is_lost_is_said_by_name(answering: Callable[..., Path], answer: bytes) -> None:
    with ControlClient(answering(answer)) as control, pytest.raises(UnavailableError) as caught:
        control.get_state_blob(BlobType.PERMANENT)
    assert caught.value.reason == "CONTROL_CONNECTION_LOST"


def test_state_is_put_and_taken_through_a_control_socket(tmp_path: Path, files: Path) -> None:
    before = of_swtpm(tmp_path / "old", files, action=furnish)
    payload = read_state(tmp_path / "old" / PERMALL, KeySource(), None)
    with Swtpm(tmp_path / "new") as stand_in:
        put_state(stand_in.control, payload)
        stand_in.wait()
    assert of_swtpm(tmp_path / "new", files, action=furniture) == before
    with Swtpm(tmp_path / "new") as stand_in:
        taken = take_state(stand_in.control)
        stand_in.wait()
    assert taken == read_state(tmp_path / "new" / PERMALL, KeySource(), None)


def test_a_tpm_refuses_state_that_is_damaged_inside(tmp_path: Path, files: Path) -> None:
    of_swtpm(tmp_path / "old", files, action=furnish)
    payload = bytearray(read_state(tmp_path / "old" / PERMALL, KeySource(), None))
    payload[len(payload) // 2 :] = b""
    with Swtpm(tmp_path / "new") as stand_in, pytest.raises(SealedStateError) as caught:
        put_state(stand_in.control, bytes(payload))
    assert caught.value.reason == "SWTPM_STATE_REFUSED"
