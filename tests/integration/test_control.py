"""swtpm's control protocol on an instance's control socket: a VM's whole life as QEMU was recorded to live it."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import raw, vmm
from tests.support.daemon import DaemonProcess
from tests.support.vmm import CRB_BUFFER, TIS_BUFFER, Vmm, plain_swtpm
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2

ok = bytes(4)


@pytest.fixture
def off(daemon: DaemonProcess, name: str) -> pb.Instance:
    """An instance that is OFF."""
    return daemon.create(name)


@pytest.fixture
def vm(off: pb.Instance) -> Iterator[Vmm]:
    """A VM that has booted."""
    machine = Vmm(off.control_socket).boot()
    yield machine
    machine.close()


@pytest.mark.parametrize("size", [CRB_BUFFER, TIS_BUFFER])
def test_a_cold_start_byte_for_byte(daemon: DaemonProcess, off: pb.Instance, size: int, tmp_path: Path) -> None:
    def start(control: str | Path) -> list[str]:
        machine = Vmm(control)
        answers = machine.cold_start(size)
        answers += [machine.ask(vmm.ESTABLISHED), machine.ask(vmm.LOCALITY, bytes(4))]
        answers += [machine.tpm(bytes.fromhex("00c10000000a000000f1")), machine.tpm(raw.startup_clear())]
        answers += machine.reset(size)
        answers.append(machine.tpm(raw.startup_clear()))
        answers.append(machine.ask(vmm.SHUTDOWN))
        return [answer.hex() for answer in answers]

    with plain_swtpm(tmp_path / "peer") as peer:
        expected = start(peer)
    # The one difference: bit 16, LOCK_STORAGE, which swtpm has in later versions.
    assert expected[2] == "000000000000ffff"
    expected[2] = "000000000001ffff"
    assert start(off.control_socket) == expected
    assert daemon.until(off.name, pb.OFF).state == pb.OFF


def test_attach_powers_on_and_the_end_of_the_vm_powers_off(daemon: DaemonProcess, off: pb.Instance) -> None:
    machine = Vmm(off.control_socket).boot()
    on = daemon.get(off.name)
    assert (on.state, on.epoch) == (pb.ON, off.epoch + 1)
    raw.succeed(raw.connect(on.tpm_socket), raw.pcr_read(0))
    machine.close()
    daemon.until(off.name, pb.OFF)
    again = Vmm(off.control_socket).boot()
    assert daemon.get(off.name).epoch == on.epoch + 1
    assert again.ask(vmm.SHUTDOWN) == ok
    daemon.until(off.name, pb.OFF)


def test_a_vm_that_starts_the_moment_another_ends_is_served(daemon: DaemonProcess, off: pb.Instance) -> None:
    for _ in range(10):
        machine = Vmm(off.control_socket).boot()
        machine.close()
    daemon.until(off.name, pb.OFF)


def test_a_second_vm_is_refused_while_the_first_lives(daemon: DaemonProcess, off: pb.Instance, vm: Vmm) -> None:
    before = vm.tpm(raw.pcr_read(0))
    second = Vmm(off.control_socket)
    assert second.control.recv(1) == b""
    assert vm.tpm(raw.pcr_read(0)) == before
    assert "INSTANCE_IN_USE" in daemon.log_text()


def test_a_vm_attaches_however_many_clients_there_are(daemon: DaemonProcess, running: pb.Instance) -> None:
    others = [raw.connect(running.tpm_socket) for _ in range(16)]
    others += [raw.connect(f"{running.tpm_socket}.ctrl") for _ in range(8)]
    raw.succeed(others[0], raw.pcr_read(0))
    others[-1].sendall(vmm.request(vmm.CAPABILITY))
    assert len(others[-1].recv(16)) == 8
    machine = Vmm(running.control_socket).boot()
    assert raw.rc_of(machine.tpm(raw.pcr_read(0))) == 0
    assert machine.ask(vmm.SHUTDOWN) == ok
    daemon.until(running.name, pb.OFF)
    for sock in others:
        sock.close()


def test_nobody_beside_the_vm_resets_its_tpm_or_takes_its_state(daemon: DaemonProcess, off: pb.Instance, vm: Vmm) -> None:
    expected = prepare(vm)
    beside = Vmm(f"{off.tpm_socket}.ctrl")
    refused = bytes.fromhex("00000009")
    assert beside.ask(vmm.INIT, bytes(4)) == refused
    assert beside.ask(vmm.STOP) == refused
    assert beside.ask(vmm.SHUTDOWN) == refused
    assert beside.ask(vmm.GET_STATE, struct.pack(">III", 1, 1, 0)) == refused + bytes(12)
    assert beside.ask(vmm.SET_STATE, struct.pack(">III", 0, 2, 4) + bytes(4)) == refused
    assert beside.ask(vmm.STORE_VOLATILE) == refused
    assert beside.ask(vmm.HASH_START) == refused
    assert beside.ask(vmm.LOCALITY, b"\3\0\0\0") == refused
    assert len(beside.ask(vmm.CAPABILITY)) == 8
    assert beside.ask(vmm.LOCALITY, bytes(4)) == ok
    reset = daemon.vtpm("instance", "reset", off.name, check=False)
    assert reset.returncode == 5
    assert b"INSTANCE_IN_USE" in reset.stderr
    assert marks(vm) == expected
    assert daemon.get(off.name).state == pb.ON


def test_the_service_and_the_vm_use_the_same_tpm(daemon: DaemonProcess, off: pb.Instance, vm: Vmm) -> None:
    raw.rc_of(vm.tpm(raw.pcr_extend(0, b"\x07" * 32)))
    read = daemon.client.call(
        daemon.client.tpm.ReadPcrs,
        tpm_pb2.ReadPcrsRequest(instance=off.name, selections=[tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[0])]),
    )
    assert read.values[0].digest in vm.tpm(raw.pcr_read(0))


def test_quotes_before_the_tpm_is_initialised_are_refused_by_name(daemon: DaemonProcess, off: pb.Instance) -> None:
    machine = Vmm(off.control_socket)
    assert machine.give_data_channel() == ok
    request = tpm_pb2.ReadPcrsRequest(instance=off.name)
    from vtpm.errors import VtpmError

    with pytest.raises(VtpmError) as refused:
        daemon.client.call(daemon.client.tpm.ReadPcrs, request)
    assert refused.value.reason == "TPM_NOT_POWERED"
    machine.close()


COMMANDS = {
    "capability": vmm.request(vmm.CONFIG),
    "established": vmm.request(vmm.ESTABLISHED),
    "locality 3": vmm.request(vmm.LOCALITY, b"\3\0\0\0"),
    "locality 5": vmm.request(vmm.LOCALITY, b"\5\0\0\0"),
    "locality 0": vmm.request(vmm.LOCALITY, bytes(4)),
    "hash data without start": vmm.request(vmm.HASH_DATA, struct.pack(">I", 4) + b"abcd"),
    "hash end without start": vmm.request(vmm.HASH_END),
    "hash start": vmm.request(vmm.HASH_START),
    "hash data": vmm.request(vmm.HASH_DATA, struct.pack(">I", 4) + b"abcd"),
    "hash end": vmm.request(vmm.HASH_END),
    "cancel": vmm.request(vmm.CANCEL),
    "store volatile": vmm.request(vmm.STORE_VOLATILE),
    "reset established at 0": vmm.request(vmm.RESET_ESTABLISHED, bytes(4)),
    "reset established at 3": vmm.request(vmm.RESET_ESTABLISHED, b"\3\0\0\0"),
    "reset established at 5": vmm.request(vmm.RESET_ESTABLISHED, b"\5\0\0\0"),
    "volatile": vmm.request(vmm.GET_STATE, struct.pack(">III", 1, 2, 1 << 20)),
    "savestate": vmm.request(vmm.GET_STATE, struct.pack(">III", 1, 3, 0)),
    "state of type 4": vmm.request(vmm.GET_STATE, struct.pack(">III", 1, 4, 0)),
    "buffer size": vmm.request(vmm.BUFFER, bytes(4)),
    "buffer size 3968": vmm.request(vmm.BUFFER, struct.pack(">I", 3968)),
    "buffer size 10": vmm.request(vmm.BUFFER, struct.pack(">I", 10)),
    "buffer size 99999": vmm.request(vmm.BUFFER, struct.pack(">I", 99999)),
    "info 1": vmm.request(vmm.INFO, struct.pack(">QII", 1, 0, 0)),
    "info 3": vmm.request(vmm.INFO, struct.pack(">QII", 3, 0, 0)),
    "info 0": vmm.request(vmm.INFO, struct.pack(">QII", 0, 0, 0)),
    "info behind its end": vmm.request(vmm.INFO, struct.pack(">QII", 1, 5000, 0)),
    "state that is short": vmm.request(vmm.SET_STATE, struct.pack(">III", 0, 1, 5) + b"abcde"),
    "state of type 9": vmm.request(vmm.SET_STATE, struct.pack(">III", 0, 9, 5) + b"abcde"),
    "data channel without descriptor": vmm.request(vmm.DATAFD),
    "stop": vmm.request(vmm.STOP),
    "stop again": vmm.request(vmm.STOP),
}


@pytest.mark.parametrize("state", ["before init", "running", "stopped"])
def test_every_command_answers_as_swtpm_does(off: pb.Instance, state: str, tmp_path: Path) -> None:
    def answers(control: str | Path) -> dict[str, str]:
        machine = Vmm(control)
        if state != "before init":
            machine.ask(vmm.INIT, bytes(4))
        if state == "stopped":
            machine.ask(vmm.STOP)
        got = {}
        for what, bytes_sent in COMMANDS.items():
            machine.control.sendall(bytes_sent)
            got[what] = machine.until_quiet().hex()
        machine.close()
        return got

    with plain_swtpm(tmp_path / "peer") as peer:
        expected = answers(peer)
    if state != "running":
        # swtpm answers with the TPM_RESULT alone here, and QEMU waits for more.
        for what, size in (("volatile", 16), ("savestate", 16), ("state of type 4", 16), ("established", 8)):
            expected[what] = expected[what].ljust(2 * size, "0")
    assert answers(off.control_socket) == expected


def test_an_h_crtm_event_is_measured_as_swtpm_measures_it(off: pb.Instance, tmp_path: Path) -> None:
    def measure(control: str | Path) -> str:
        machine = Vmm(control)
        machine.cold_start()
        machine.ask(vmm.HASH_START)
        for part in (b"firmware", b" volume"):
            machine.ask(vmm.HASH_DATA, struct.pack(">I", len(part)) + part)
        assert machine.ask(vmm.HASH_END) == ok
        machine.tpm(raw.startup_clear())
        pcr = machine.tpm(raw.pcr_read(0, 17))[14:].hex()
        machine.close()
        return pcr

    with plain_swtpm(tmp_path / "peer") as peer:
        expected = measure(peer)
    assert measure(off.control_socket) == expected
    assert expected != measure_nothing(off)


def measure_nothing(instance: pb.Instance) -> str:
    machine = Vmm(instance.control_socket).boot()
    pcr = machine.tpm(raw.pcr_read(0, 17))[14:].hex()
    machine.close()
    return pcr


def test_the_header_with_a_locality_in_front_of_a_command(off: pb.Instance, vm: Vmm) -> None:
    command = raw.get_random(4)
    assert vm.data is not None
    vm.data.sendall(struct.pack(">IBI", 8, 3, len(command)) + command)
    data = b""
    while len(data) < 24:
        data += vm.data.recv(100)
    assert struct.unpack_from(">I", data) == (16,)
    assert raw.rc_of(data[4:20]) == 0
    assert data[20:] == bytes(4)
    # Without the header the locality is what it was.
    assert raw.rc_of(vm.tpm(raw.pcr_extend(20, b"\x01" * 32))) == 0x907


@pytest.mark.parametrize("what", ["two", "a directory", "a datagram socket"])
def test_a_data_channel_that_is_no_stream_socket_is_refused(off: pb.Instance, what: str) -> None:
    machine = Vmm(off.control_socket)
    first, second = socket.socketpair()
    directory = os.open("/", os.O_RDONLY)
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    fds = {"two": [first.fileno(), second.fileno()], "a directory": [directory], "a datagram socket": [datagram.fileno()]}[what]
    socket.send_fds(machine.control, [vmm.request(vmm.DATAFD)], fds)
    assert machine.control.recv(4) == bytes.fromhex("00000003")
    assert machine.give_data_channel() == ok
    machine.reset()
    assert raw.rc_of(machine.tpm(raw.startup_clear())) == 0
    os.close(directory)
    for sock in (first, second, datagram):
        sock.close()
    machine.close()


def test_a_second_data_channel_is_refused(vm: Vmm) -> None:
    first = vm.data
    assert vm.give_data_channel() == bytes.fromhex("0000001f")
    vm.data = first
    assert raw.rc_of(vm.tpm(raw.pcr_read(0))) == 0


def test_requests_cut_in_every_place_are_answered_when_they_are_whole(off: pb.Instance) -> None:
    whole = vmm.request(vmm.CAPABILITY) + vmm.request(vmm.LOCALITY, b"\3\0\0\0") + vmm.request(vmm.BUFFER, bytes(4))
    expected = None
    for cut in range(len(whole) + 1):
        machine = Vmm(off.control_socket)
        machine.control.sendall(whole[:cut])
        time.sleep(0.005)
        machine.control.sendall(whole[cut:])
        answer = machine.exactly(8 + 4 + 16)
        expected = expected or answer
        assert answer == expected
        machine.close()


def test_a_code_that_is_unknown_ends_the_connection(daemon: DaemonProcess, off: pb.Instance) -> None:
    machine = Vmm(off.control_socket)
    assert machine.ask(99) == bytes.fromhex("0000000a")
    assert machine.control.recv(1) == b""
    daemon.until(off.name, pb.OFF)


def test_a_length_that_lies_ends_the_connection(daemon: DaemonProcess, off: pb.Instance) -> None:
    machine = Vmm(off.control_socket)
    assert machine.ask(vmm.SET_STATE, struct.pack(">III", 0, 1, 0xFFFFFFFF)) == bytes.fromhex("0000000a")
    assert machine.control.recv(1) == b""
    daemon.until(off.name, pb.OFF)


# ---- migration --------------------------------------------------------------------------------------------------------------


def prepare(machine: Vmm) -> bytes:
    """Give a TPM an NV counter, an extended PCR and a session; return what a later TPM must show."""
    raw.rc_of(machine.tpm(raw.pcr_extend(16, b"\x16" * 32)))
    assert raw.rc_of(machine.tpm(raw.nv_define(raw.COUNTER, counter=True))) == 0
    assert raw.rc_of(machine.tpm(raw.nv_increment())) == 0
    return marks(machine)


def marks(machine: Vmm) -> bytes:
    return machine.tpm(raw.pcr_read(16)) + machine.tpm(raw.nv_read())


def receive(control: str | Path, permanent: bytes, volatile: bytes) -> Vmm:
    """What a QEMU started with -incoming does."""
    machine = Vmm(control)
    machine.give_data_channel()
    machine.tpm(bytes.fromhex("80010000000a00000181"))
    machine.ask(vmm.CAPABILITY)
    assert [machine.ask(vmm.STOP), machine.ask(vmm.BUFFER, bytes(4))[:4], machine.ask(vmm.STOP)] == [ok] * 3
    machine.ask(vmm.BUFFER, struct.pack(">I", CRB_BUFFER))
    assert machine.ask(vmm.STOP) == ok
    assert machine.set_state(vmm.PERMANENT, permanent) == 0
    assert machine.set_state(vmm.VOLATILE, volatile) == 0
    assert machine.ask(vmm.INIT, struct.pack(">I", 1)) == ok
    return machine


@pytest.mark.parametrize(("source", "target"), [("ours", "ours"), ("ours", "swtpm"), ("swtpm", "ours")])
def test_a_vm_migrates_with_its_tpm(daemon: DaemonProcess, name: str, tmp_path: Path, source: str, target: str) -> None:
    with plain_swtpm(tmp_path / "a") as peer_a, plain_swtpm(tmp_path / "b") as peer_b:
        first = peer_a if source == "swtpm" else Path(daemon.create(f"{name}-a").control_socket)
        second = peer_b if target == "swtpm" else Path(daemon.create(f"{name}-b").control_socket)
        machine = Vmm(first).boot()
        expected = prepare(machine)
        permanent, volatile = machine.get_state(vmm.PERMANENT), machine.get_state(vmm.VOLATILE)
        with pytest.raises(AssertionError, match="0x800"):
            machine.get_state(vmm.SAVESTATE)
        # The source stays usable until its QEMU ends.
        assert marks(machine) == expected
        arrived = receive(second, permanent, volatile)
        assert marks(arrived) == expected
        assert raw.rc_of(arrived.tpm(raw.nv_increment())) == 0
        machine.close()
        if target == "ours":
            # The instance shows the keys of the TPM that it has now, and has them after a cold start too.
            deadline = time.monotonic() + 5
            theirs = {key.public_pem for key in daemon.get(f"{name}-a").keys} if source == "ours" else None
            while theirs and {key.public_pem for key in daemon.get(f"{name}-b").keys} != theirs:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            arrived.ask(vmm.SHUTDOWN)
            daemon.until(f"{name}-b", pb.OFF)
            again = Vmm(second).boot()
            assert raw.rc_of(again.tpm(raw.nv_read())) == 0
            again.close()
        arrived.close()


def test_a_volatile_state_that_was_set_is_used_once(off: pb.Instance) -> None:
    machine = Vmm(off.control_socket).boot()
    expected = prepare(machine)
    permanent, volatile = machine.get_state(vmm.PERMANENT), machine.get_state(vmm.VOLATILE)
    machine.ask(vmm.STOP)
    machine.set_state(vmm.PERMANENT, permanent)
    machine.set_state(vmm.VOLATILE, volatile)
    assert machine.ask(vmm.INIT, struct.pack(">I", 1)) == ok
    assert marks(machine) == expected
    machine.reset()
    assert raw.rc_of(machine.tpm(raw.pcr_read(16))) == 0x100, "a reset has fresh PCRs"
    machine.close()


def test_a_kept_volatile_state_is_forgotten_by_the_next_command(off: pb.Instance) -> None:
    machine = Vmm(off.control_socket).boot()
    expected = prepare(machine)
    assert machine.ask(vmm.STORE_VOLATILE) == ok
    machine.ask(vmm.STOP)
    assert machine.ask(vmm.INIT, bytes(4)) == ok
    assert marks(machine) == expected
    assert machine.ask(vmm.STORE_VOLATILE) == ok
    raw.rc_of(machine.tpm(raw.pcr_extend(16, b"\x17" * 32)))
    machine.ask(vmm.STOP)
    assert machine.ask(vmm.INIT, bytes(4)) == ok
    assert raw.rc_of(machine.tpm(raw.pcr_read(16))) == 0x100, "PCRs never go back"
    machine.close()


def test_states_that_do_not_fit_leave_the_instance_as_it_was(daemon: DaemonProcess, off: pb.Instance) -> None:
    machine = Vmm(off.control_socket).boot()
    prepare(machine)
    permanent, volatile = machine.get_state(vmm.PERMANENT), machine.get_state(vmm.VOLATILE)
    count = machine.tpm(raw.nv_read())
    machine.ask(vmm.STOP)
    for hurt in (permanent[:-1], permanent + b"x", permanent[:40] + bytes(len(permanent) - 40), b"", permanent[:10]):
        assert machine.set_state(vmm.PERMANENT, hurt) == 3
    for hurt in (volatile[:-1], volatile[:60] + bytes(len(volatile) - 60), permanent, b""):
        assert machine.set_state(vmm.VOLATILE, hurt) == 3
    assert machine.ask(vmm.INIT, bytes(4)) == ok
    assert raw.rc_of(machine.tpm(raw.startup_clear())) == 0
    assert machine.tpm(raw.nv_read()) == count
    machine.close()
    daemon.until(off.name, pb.OFF)
    assert {key.public_pem for key in daemon.get(off.name).keys} == {key.public_pem for key in off.keys}


# ---- the daemon comes and goes ---------------------------------------------------------------------------------------------


def test_a_vm_is_reset_and_powered_off_without_a_daemon(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    web = daemon.create("web-1")
    machine = Vmm(web.control_socket).boot()
    daemon.kill()
    assert machine.reset()[-1] == ok
    # TPM2_Startup writes NV and would wait for a daemon.
    assert raw.rc_of(machine.tpm(raw.pcr_read(0))) == 0x100
    assert machine.ask(vmm.SHUTDOWN) == ok
    machine.close()
    time.sleep(0.3)
    daemon.start()
    # Powered off, not lost.
    assert daemon.get("web-1").state == pb.OFF
    again = Vmm(web.control_socket).boot()
    again.close()


def test_a_vm_goes_on_with_the_next_daemon(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    web = daemon.create("web-1")
    machine = Vmm(web.control_socket).boot()
    expected = prepare(machine)
    daemon.kill()
    daemon.start()
    assert marks(machine) == expected
    assert raw.rc_of(machine.tpm(raw.nv_increment())) == 0
    second = Vmm(web.control_socket)
    assert second.control.recv(1) == b"", "the VM is still attached"
    machine.close()
    daemon.until("web-1", pb.OFF)


def test_a_state_blob_is_looked_at_when_it_is_set(off: pb.Instance, tmp_path: Path) -> None:
    def results(control: str | Path) -> list[bool]:
        machine = Vmm(control).boot()
        machine.tpm(raw.pcr_extend(3, b"\x07" * 32))
        before = machine.tpm(raw.pcr_read(3))
        permanent, volatile = machine.get_state(vmm.PERMANENT), machine.get_state(vmm.VOLATILE)
        machine.ask(vmm.STOP)
        flipped = bytearray(volatile)
        flipped[len(volatile) // 2] ^= 1
        kinds = [
            (vmm.PERMANENT, volatile),
            (vmm.VOLATILE, permanent),
            (vmm.VOLATILE, bytes(flipped)),
            (vmm.VOLATILE, volatile),
        ]
        taken = [machine.set_state(kind, blob) == 0 for kind, blob in kinds]
        assert machine.ask(vmm.INIT, bytes(4)) == ok
        assert machine.tpm(raw.pcr_read(3)) == before
        # What was refused is nowhere to be found, and what was taken is used once.
        machine.reset()
        assert raw.rc_of(machine.tpm(raw.startup_clear())) == 0
        assert machine.tpm(raw.pcr_read(3))[-32:] == bytes(32)
        machine.close()
        return taken

    assert results(off.control_socket) == [False, False, False, True]
    with plain_swtpm(tmp_path / "peer") as peer:
        assert results(peer) == [False, False, False, True]


def test_a_refused_state_blob_leaves_no_trace(off: pb.Instance) -> None:
    machine = Vmm(off.control_socket).boot()
    machine.tpm(raw.pcr_extend(3, b"\x07" * 32))
    volatile = machine.get_state(vmm.VOLATILE)
    machine.ask(vmm.STOP)
    assert machine.set_state(vmm.VOLATILE, volatile[:-1] + bytes([volatile[-1] ^ 1])) != 0
    assert machine.ask(vmm.INIT, bytes(4)) == ok
    assert raw.rc_of(machine.tpm(raw.startup_clear())) == 0
    assert machine.tpm(raw.pcr_read(3))[-32:] == bytes(32)
    machine.close()
