"""vtpm-swtpm and plain swtpm with the same keys: encrypted blobs between both, and the states in one file."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_dropin import BOTH, COMMANDS, KEY, OURS, PLAIN, READY, Running, running
from tests.support import raw, vmm
from tests.support.vmm import Vmm

OTHER = {OURS: PLAIN, PLAIN: OURS}
MIGRATION_KEY = "ffeeddccbbaa99887766554433221100" * 2
ENCRYPTED, DECRYPTED = 2, 1


@pytest.fixture
def options(tmp_path: Path) -> dict[str, list[str]]:
    """Options by what they make be encrypted."""
    for name, text in (("key", KEY * 2), ("migration", MIGRATION_KEY), ("other", MIGRATION_KEY[::-1]), ("pwd", "a password")):
        (tmp_path / name).write_text(text)
    # Of one size: once swtpm 0.7.1 has used a key of 256 bits, it can't encrypt with one of 128 any more.
    key = ["--key", f"file={tmp_path / 'key'},format=hex,mode=aes-256-cbc"]
    migration = ["--migration-key", f"file={tmp_path / 'migration'},format=hex,mode=aes-256-cbc"]
    return {
        "nothing": [],
        "file": key,
        "migration": migration,
        "both": key + migration,
        "other": [*key, "--migration-key", f"file={tmp_path / 'other'},format=hex,mode=aes-256-cbc"],
        "small": ["--migration-key", f"pwdfile={tmp_path / 'pwd'},mode=aes-128-cbc"],
    }


class Blob:
    """What GET_STATEBLOB answered."""

    def __init__(self, machine: Vmm, kind: int, flags: int, offset: int = 0) -> None:
        machine.control.sendall(vmm.request(vmm.GET_STATE, struct.pack(">III", flags, kind, offset)))
        self.result, self.flags, self.total, length = struct.unpack(">IIII", machine.exactly(16))
        self.data = machine.exactly(length)

    @property
    def header_flags(self) -> int:
        return int.from_bytes(self.data[4:6], "big")


def give(machine: Vmm, kind: int, blob: bytes, flags: int = 0) -> int:
    machine.control.sendall(vmm.request(vmm.SET_STATE, struct.pack(">III", flags, kind, len(blob))))
    machine.control.sendall(blob)
    return int.from_bytes(machine.exactly(4), "big")


def booted(tpm: Running) -> Vmm:
    machine = Vmm(tpm.control).boot()
    machine.tpm(raw.pcr_extend(3, b"\x07" * 32))
    machine.tpm(raw.nv_define(raw.ORDINARY, counter=False))
    machine.tpm(raw.nv_write(b"migrated"))
    return machine


@pytest.mark.parametrize("encrypted", ["file", "migration", "both", "small"])
@pytest.mark.parametrize("flags", [0, DECRYPTED])
@BOTH
def test_a_vm_migrates_encrypted(
    program: str, flags: int, encrypted: str, options: dict[str, list[str]], tmp_path: Path
) -> None:
    arguments = options[encrypted]
    with (
        running(program, tmp_path / "a", *arguments, server=False) as first,
        running(OTHER[program], tmp_path / "b", *arguments, server=False) as second,
    ):
        machine, other = booted(first), Vmm(second.control)
        assert machine.ask(vmm.CONFIG) == other.ask(vmm.CONFIG)
        before = machine.tpm(raw.pcr_read(3))
        blobs = {kind: Blob(machine, kind, flags) for kind in (vmm.PERMANENT, vmm.VOLATILE)}
        plain = encrypted == "file" and flags == DECRYPTED
        assert all((b"migrated" in blob.data) == plain for kind, blob in blobs.items() if kind == vmm.PERMANENT)
        other.give_data_channel()
        other.ask(vmm.STOP)
        assert [give(other, kind, blob.data, blob.flags) for kind, blob in blobs.items()] == [0, 0]
        assert other.ask(vmm.INIT, b"\0\0\0\1") == bytes(4)
        assert other.tpm(raw.pcr_read(3)) == before
        assert raw.nv_value(other.tpm(raw.nv_read(raw.ORDINARY))) == b"migrated"


@pytest.mark.parametrize("encrypted", ["file", "migration", "both", "small"])
def test_blobs_are_marked_as_swtpm_marks_them(encrypted: str, options: dict[str, list[str]], tmp_path: Path) -> None:
    told = {}
    for program in (OURS, PLAIN):
        with running(program, tmp_path / program, *options[encrypted], server=False) as tpm:
            machine = Vmm(tpm.control).boot()
            blobs = [Blob(machine, kind, flags) for kind in (1, 2, 3) for flags in (0, DECRYPTED)]
            told[program] = [(blob.result, blob.flags, blob.header_flags, blob.total == len(blob.data)) for blob in blobs]
    assert told[OURS] == told[PLAIN]


def test_an_encrypted_blob_in_pieces_is_one_blob(options: dict[str, list[str]], tmp_path: Path) -> None:
    """Each piece of plain swtpm's is of a blob with another IV."""
    with running(OURS, tmp_path / "a", *options["both"], server=False) as tpm:
        machine = booted(tpm)
        whole = Blob(machine, vmm.PERMANENT, 0)
        rest = Blob(machine, vmm.PERMANENT, 0, 1000)
        assert (rest.total, rest.data) == (whole.total - 1000, whole.data[1000:])
        assert Blob(machine, vmm.PERMANENT, 0, whole.total).data == b""
        machine.ask(vmm.STOP)
        assert give(machine, vmm.PERMANENT, whole.data[:1000] + rest.data) == 0


@pytest.mark.parametrize("mistake", ["no key", "other key", "smaller key", "a flipped bit", "cut", "a lie", "no file key"])
def test_a_blob_that_can_not_be_opened_is_refused_as_by_swtpm(
    mistake: str, options: dict[str, list[str]], tmp_path: Path
) -> None:
    with running(PLAIN, tmp_path / "source", *options["both"], server=False) as tpm:
        blob = Blob(booted(tpm), vmm.PERMANENT, DECRYPTED if mistake == "a lie" else 0).data
    arguments = {"no key": "file", "other key": "other", "smaller key": "small", "no file key": "migration"}.get(
        mistake, "both"
    )
    flags = 0
    match mistake:
        case "a flipped bit":
            blob = blob[:100] + bytes((blob[100] ^ 1,)) + blob[101:]
        case "cut":
            blob = blob[:-1]
        case "a lie":
            # It is said to be encrypted with --key, and is not.
            flags = ENCRYPTED
    results = {}
    for program in (OURS, PLAIN):
        with running(program, tmp_path / program, *options[arguments], server=False) as tpm:
            machine = Vmm(tpm.control)
            machine.ask(vmm.STOP)
            results[program] = give(machine, vmm.PERMANENT, blob, flags)
            # What was there is unharmed.
            machine.give_data_channel()
            assert machine.ask(vmm.INIT, bytes(4)) == bytes(4)
            raw.rc_of(machine.tpm(raw.startup_clear()))
            assert raw.rc_of(machine.tpm(raw.pcr_read(0))) == 0
    assert results[OURS] != 0
    assert results[OURS] == results[PLAIN]


def test_a_plain_blob_is_taken_with_a_migration_key(options: dict[str, list[str]], tmp_path: Path) -> None:
    """As swtpm does it, so that a VM can come from where there is no key yet."""
    with running(PLAIN, tmp_path / "a", server=False) as first:
        machine = booted(first)
        blob = Blob(machine, vmm.PERMANENT, DECRYPTED).data
    with running(OURS, tmp_path / "b", *options["migration"], server=False) as second:
        other = Vmm(second.control)
        assert give(other, vmm.PERMANENT, blob) == 0


# ---- the states in one file ----------------------------------------------------------------------------------------------


def command(program: str, file: Path, *arguments: str) -> list[str]:
    return [*COMMANDS[program], "socket", "--tpm2", "--tpmstate", f"backend-uri=file://{file}", *arguments]


class OnFile(Running):
    """The same on a file."""

    def __init__(self, program: str, state: Path, *arguments: str) -> None:
        # The last --tpmstate counts.
        super().__init__(program, state, "--tpmstate", f"backend-uri=file://{state / 'states'}", *READY, *arguments)


@pytest.mark.parametrize("encrypted", ["nothing", "file"])
@BOTH
def test_each_goes_on_with_the_others_file(program: str, encrypted: str, options: dict[str, list[str]], tmp_path: Path) -> None:
    state, arguments = tmp_path / "state", options[encrypted]
    for turn, name in enumerate((program, OTHER[program], program, OTHER[program])):
        tpm = OnFile(name, state, *arguments)
        try:
            sock = raw.connect(tpm.data)
            if turn == 0:
                raw.succeed(sock, raw.nv_define(raw.ORDINARY, counter=False))
            else:
                assert raw.nv_value(raw.succeed(sock, raw.nv_read(raw.ORDINARY))) == (turn - 1).to_bytes(8, "big")
            raw.succeed(sock, raw.nv_write(turn.to_bytes(8, "big")))
            if turn % 2:
                tpm.ioctl("-v")
            tpm.shut_down()
        finally:
            tpm.process.kill()
    assert not (state / "tpm2-00.permall").exists()
    told = {
        name: subprocess.run(command(name, state / "states", "--print-states"), capture_output=True, check=True).stdout.strip()
        for name in (OURS, PLAIN)
    }
    assert told[OURS] == told[PLAIN]
    assert b"permall" in told[OURS]


def test_two_never_run_on_one_file(tmp_path: Path) -> None:
    tpm = OnFile(OURS, tmp_path / "state")
    try:
        sock = raw.connect(tpm.data)
        for written in (False, True):
            if written:
                # The file is another one now.
                raw.succeed(sock, raw.nv_define(raw.ORDINARY, counter=False))
            words = command(OURS, tmp_path / "state" / "states", "--ctrl", f"type=unixio,path={tmp_path / 'c'}")
            refused = subprocess.run(words, capture_output=True, text=True, timeout=20)
            assert refused.returncode == 1
            assert "lock" in refused.stderr
    finally:
        tpm.process.kill()
        tpm.process.wait()


@pytest.mark.parametrize("damage", ["noise", "cut", "a directory", "a device"])
def test_a_file_that_holds_no_states_is_refused_and_left_alone(damage: str, tmp_path: Path) -> None:
    tpm = OnFile(OURS, tmp_path / "state")
    tpm.shut_down()
    file = tmp_path / "state" / "states"
    if damage == "noise":
        file.write_bytes(os.urandom(5000))
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    before = file.read_bytes()
    place = {"a directory": tmp_path, "a device": Path("/dev/null")}.get(damage, file)
    words = command(OURS, place, "--ctrl", f"type=unixio,path={tmp_path / 'c'}")
    refused = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert str(place) in refused.stderr
    assert file.read_bytes() == before


@pytest.mark.parametrize("maker", ["vtpm.cli.dropin_setup", "swtpm_setup"])
def test_a_tpm_is_made_in_a_file(maker: str, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    words = [maker] if maker == "swtpm_setup" else [COMMANDS[OURS][0], "-m", maker]
    place = f"file://{tmp_path / 'state' / 'states'}"
    subprocess.run([*words, "--tpm2", "--tpmstate", place, "--createek"], check=True, capture_output=True, timeout=60)
    for program in (PLAIN, OURS):
        tpm = OnFile(program, tmp_path / "state")
        try:
            assert "0x81010001" in tpm.tools("tpm2_getcap", "handles-persistent")
            tpm.shut_down()
        finally:
            tpm.process.kill()
