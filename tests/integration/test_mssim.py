"""The TPM simulator's ports: tpm2-tools by their mssim TCTI, IBM's TSS tools, and clients that mean no good."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.daemon import DaemonProcess, kill_all, worker_pids
from tests.support.mssim import DONE, REFUSED, SEND_COMMAND, Simulator, receive, rest
from tests.support.ports import free_pair
from vtpm.api.v1 import instance_pb2 as pb

POWER_ON, POWER_OFF, RESET, SESSION_END, STOP = 1, 2, 17, 20, 21
IGNORED = (3, 4, 9, 10, 11, 12, 13, 14, 30)
TPM_RC_INITIALIZE = 0x100
TPM_RC_LOCALITY = 0x907
TPM_RC_INSUFFICIENT = 0x09A
TPM_RC_COMMAND_SIZE = 0x142
ZEROS = bytes(32)

# Each test has an instance and a pair of ports of its own.
PORTS = {f"sim-{number}": free_pair() for number in range(32)}
_names = iter(PORTS)


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """A daemon that serves the ports."""
    with DaemonProcess(environment={"VTPM_MSSIM_PORTS": json.dumps(PORTS)}) as process:
        yield process


@pytest.fixture
def absent(daemon: DaemonProcess, tmp_path: Path) -> Simulator:
    """A pair of ports whose instance does not exist."""
    return Simulator(daemon, name := next(_names), PORTS[name], tmp_path)


@pytest.fixture
def off(absent: Simulator) -> Simulator:
    """An instance that is OFF."""
    absent.daemon.create(absent.name)
    return absent


@pytest.fixture
def simulator(off: Simulator) -> Simulator:
    """An instance that is ON and started up."""
    off.daemon.power_on(off.name)
    return off


# ---- the tools -----------------------------------------------------------------------------------------------------------


def test_tpm2_tools_see_what_the_service_sees(simulator: Simulator) -> None:
    assert len(bytes.fromhex(simulator.tool("tpm2_getrandom", "--hex", "16").stdout)) == 16
    simulator.tool("tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    simulator.tool("tpm2_pcrread", "sha256:16", "-o", "pcr.bin")
    read = (simulator.directory / "pcr.bin").read_bytes()
    assert read == simulator.pcr(16) != ZEROS


def test_tpm2_tools_make_keys_and_sign(simulator: Simulator) -> None:
    simulator.tool("tpm2_createprimary", "-G", "ecc", "-c", "primary.ctx")
    simulator.tool("tpm2_create", "-C", "primary.ctx", "-G", "ecc", "-u", "key.pub", "-r", "key.priv", "-c", "key.ctx")
    # There is no resource manager in between: contexts that were saved stay loaded until they are flushed.
    simulator.tool("tpm2_flushcontext", "-t")
    (simulator.directory / "message").write_text("so it is")
    simulator.tool("tpm2_sign", "-c", "key.ctx", "-g", "sha256", "-o", "signature", "message")
    simulator.tool("tpm2_flushcontext", "-t")
    simulator.tool("tpm2_verifysignature", "-c", "key.ctx", "-g", "sha256", "-m", "message", "-s", "signature")


def test_tpm2_tools_power_an_instance_on_and_start_it_up_themselves(off: Simulator) -> None:
    refused = off.tool("tpm2_pcrread", "sha256:0", check=False)
    assert refused.returncode
    assert "TPM not initialized" in refused.stdout + refused.stderr
    assert off.state == pb.ON
    off.tool("tpm2_startup", "-c")
    off.tool("tpm2_pcrread", "sha256:0")


@pytest.mark.parametrize("server_type", ["mssim", "raw"])
def test_ibms_tools_see_what_the_service_sees(off: Simulator, server_type: str) -> None:
    simulator = off
    assert simulator.signal(POWER_ON) == DONE

    def run(*command: str) -> str:
        return simulator.tool(*command, server_type=server_type).stdout

    run("tssstartup")
    random_bytes = run("tssgetrandom", "-by", "16").partition("length 16")[2]
    assert len(bytes.fromhex(random_bytes)) == 16
    run("tsspcrextend", "-ha", "16", "-halg", "sha256", "-ic", "measured")
    read = bytes.fromhex(run("tsspcrread", "-ha", "16", "-halg", "sha256", "-ns"))
    assert read == simulator.pcr(16) != ZEROS


def test_ibms_tools_make_keys_and_quote(simulator: Simulator) -> None:
    simulator.tool("tsscreateprimary", "-hi", "o", "-ecc", "nistp256")
    template = ("tsscreate", "-hp", "80000000", "-sir", "-ecc", "nistp256", "-opr", "key.priv", "-opu", "key.pub")
    simulator.tool(*template)
    simulator.tool("tssload", "-hp", "80000000", "-ipr", "key.priv", "-ipu", "key.pub")
    simulator.tool("tssquote", "-hk", "80000001", "-salg", "ecc", "-hp", "16", "-os", "signature", "-oa", "attest")
    verify = ("tssverifysignature", "-hk", "80000001", "-ecc", "-if", "attest", "-is", "signature")
    simulator.tool(*verify)
    simulator.tool("tssflushcontext", "-ha", "80000001")


# ---- power ---------------------------------------------------------------------------------------------------------------


def test_power_off_and_on_drop_what_is_volatile_and_keep_what_is_not(simulator: Simulator) -> None:
    simulator.tool("tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    simulator.tool("tpm2_nvdefine", "0x01000010", "-C", "o", "-s", "5", "-a", "ownerread|ownerwrite")
    (simulator.directory / "data").write_bytes(b"stays")
    simulator.tool("tpm2_nvwrite", "0x01000010", "-C", "o", "-i", "data")
    assert simulator.signal(POWER_OFF) == DONE
    assert simulator.state == pb.OFF
    assert simulator.signal(POWER_OFF) == DONE
    assert simulator.signal(POWER_ON) == DONE
    assert simulator.state == pb.ON
    with simulator.connect() as sock:
        assert raw.rc_of(simulator.ask(sock, raw.pcr_read(16))) == TPM_RC_INITIALIZE, "startup is the firmware's"
    simulator.tool("tssstartup")
    assert simulator.pcr(16) == ZEROS
    assert simulator.tool("tpm2_nvread", "0x01000010", "-C", "o").stdout == "stays"


def test_ibms_powerup_is_a_new_boot(simulator: Simulator) -> None:
    simulator.tool("tsspcrextend", "-ha", "16", "-halg", "sha256", "-ic", "measured")
    simulator.tool("tsspowerup")
    simulator.tool("tssstartup")
    assert simulator.pcr(16) == ZEROS


def test_power_on_under_a_running_tpm_changes_nothing(simulator: Simulator) -> None:
    simulator.tool("tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    before = simulator.pcr(16)
    assert simulator.signal(POWER_ON) == DONE
    assert simulator.pcr(16) == before != ZEROS


def test_reset_is_a_new_boot_and_without_power_nothing(simulator: Simulator) -> None:
    simulator.tool("tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    assert simulator.signal(RESET) == DONE
    with simulator.connect() as sock:
        assert raw.rc_of(simulator.ask(sock, raw.pcr_read(16))) == TPM_RC_INITIALIZE
        assert raw.rc_of(simulator.ask(sock, raw.startup_clear())) == 0
    assert simulator.pcr(16) == ZEROS
    assert simulator.signal(POWER_OFF) == DONE
    assert simulator.signal(RESET) == DONE
    assert simulator.state == pb.OFF


def test_signals_without_a_meaning_here_are_acknowledged_and_change_nothing(simulator: Simulator) -> None:
    simulator.tool("tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    before = simulator.pcr(16)
    with simulator.connect(platform=True) as sock:
        for code in IGNORED:
            sock.sendall(struct.pack(">I", code))
            assert receive(sock, 4) == DONE, code
    assert simulator.pcr(16) == before


def test_a_client_that_connects_does_not_give_a_failed_instance_fresh_pcrs(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    own_daemon.stop()
    own_daemon.start("--mssim-ports", json.dumps({"vm-a": (port := free_pair())}))
    own_daemon.running("vm-a")
    simulator = Simulator(own_daemon, "vm-a", port, tmp_path)
    simulator.tool("tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    kill_all(worker_pids(own_daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid))
    own_daemon.until("vm-a", pb.FAILED)
    assert simulator.signal(POWER_ON) == REFUSED
    assert simulator.tool("tpm2_pcrread", "sha256:16", check=False).returncode
    assert simulator.state == pb.FAILED
    assert simulator.signal(RESET) == DONE
    assert simulator.state == pb.ON


def test_without_power_a_command_ends_the_connection(off: Simulator) -> None:
    with off.connect() as sock:
        sock.sendall(struct.pack(">IBI", SEND_COMMAND, 0, 12) + raw.get_random(8))
        assert rest(sock) == b""
    assert off.tool("tsspcrread", "-ha", "0", check=False).returncode, "and does not hang"
    assert off.state == pb.OFF


# ---- commands ------------------------------------------------------------------------------------------------------------


def test_the_vmms_localities_are_allowed_and_others_are_the_tpms_error(simulator: Simulator) -> None:
    # PCR 17 is extended at localities 2 to 4 (TCG PC Client Platform TPM Profile).
    command = raw.pcr_extend(17, bytes(32))
    with simulator.connect() as sock:
        codes = {locality: raw.rc_of(simulator.ask(sock, command, locality)) for locality in (0, 1, 2, 3, 4, 5, 32, 255)}
    assert codes == dict.fromkeys((0, 1, 5, 32, 255), TPM_RC_LOCALITY) | dict.fromkeys((2, 3, 4), 0)


def test_a_malformed_command_is_the_tpms_error_and_the_connection_goes_on(simulator: Simulator) -> None:
    with simulator.connect() as sock:
        for command in (b"", b"\x80", raw.get_random(8)[:-1], raw.get_random(8) + b"\0"):
            assert raw.rc_of(simulator.ask(sock, command)) in (TPM_RC_INSUFFICIENT, TPM_RC_COMMAND_SIZE)
        assert raw.rc_of(simulator.ask(sock, raw.get_random(8))) == 0


def test_several_clients_at_once_get_their_own_answers(simulator: Simulator) -> None:
    def count(size: int) -> set[int]:
        with simulator.connect() as sock:
            return {len(simulator.ask(sock, raw.get_random(size))) for _ in range(100)}

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(count, range(1, 9))) == [{12 + size} for size in range(1, 9)]


def test_an_h_crtm_event_is_measured_before_the_startup(simulator: Simulator) -> None:
    def pcr_0(*parts: bytes) -> bytes:
        assert simulator.signal(17) == DONE
        with simulator.connect() as sock:
            if parts:
                sock.sendall(struct.pack(">I", 5))
                assert receive(sock, 4) == DONE
                for part in parts:
                    sock.sendall(struct.pack(">II", 6, len(part)) + part)
                    assert receive(sock, 4) == DONE
                sock.sendall(struct.pack(">I", 7))
                assert receive(sock, 4) == DONE
            assert raw.rc_of(simulator.ask(sock, raw.startup_clear())) == 0
            return simulator.ask(sock, raw.pcr_read(0))[-32:]

    # The event at locality 4 makes PCR 0 begin at 4 (PC Client Platform TPM Profile, 4.5).
    event = hashlib.sha256(b"firmware volume").digest()
    assert pcr_0(b"firmware", b" volume") == hashlib.sha256(bytes(31) + b"\x04" + event).digest()
    assert pcr_0() == bytes(32)


@pytest.mark.parametrize("code", [SESSION_END, STOP])
def test_a_client_cannot_end_the_service(simulator: Simulator, code: int) -> None:
    for platform in (False, True):
        with simulator.connect(platform=platform) as sock:
            sock.sendall(struct.pack(">I", code))
            assert rest(sock) == b""
    assert simulator.alive()


# ---- hostile clients -----------------------------------------------------------------------------------------------------


def test_garbage_on_both_ports_harms_nobody(simulator: Simulator) -> None:
    simulator.tool("tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    before = simulator.pcr(16)
    seed = random.randrange(1 << 32)
    numbers = random.Random(seed)
    patient = simulator.connect()
    heads = [b"", struct.pack(">IBI", SEND_COMMAND, 0, 30), b"\x80\x01", struct.pack(">II", 15, 1), struct.pack(">I", 11)]
    for _, platform in itertools.product(range(60), (False, True)):
        with simulator.connect(platform=platform) as sock, contextlib.suppress(ConnectionError):
            # On the platform port, nothing that could happen to be a signal of power.
            head = b"" if platform else numbers.choice(heads)
            sock.sendall(head + (b"\xff" if platform else b"") + numbers.randbytes(numbers.randrange(1, 3000)))
            sock.shutdown(socket.SHUT_WR)
            rest(sock)
    assert simulator.state == pb.ON
    assert raw.rc_of(simulator.ask(patient, raw.get_random(8))) == 0
    assert simulator.pcr(16) == before, f"seed {seed}"


def test_half_a_request_is_closed_while_others_are_served(simulator: Simulator) -> None:
    with simulator.connect() as half, simulator.connect() as silent:
        half.sendall(struct.pack(">IBI", SEND_COMMAND, 0, 12) + raw.get_random(8)[:-1])
        assert simulator.alive()
        begin = time.monotonic()
        assert rest(half) == b""
        assert time.monotonic() - begin < 15
        assert raw.rc_of(simulator.ask(silent, raw.get_random(8))) == 0


def test_too_many_connections_are_closed_and_the_rest_goes_on(simulator: Simulator) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(simulator.connect()) for _ in range(40)]
        served = 0
        for sock in socks:
            with contextlib.suppress(ConnectionError, AssertionError):
                served += raw.rc_of(simulator.ask(sock, raw.get_random(8))) == 0
        assert served == 16
        assert simulator.signal(POWER_ON) == DONE


# ---- the daemon ----------------------------------------------------------------------------------------------------------


def test_the_ports_work_as_soon_as_the_instance_exists(absent: Simulator) -> None:
    for platform in (False, True):
        with absent.connect(platform=platform) as sock:
            assert rest(sock) == b""
    assert "INSTANCE_NOT_FOUND" in absent.daemon.log_text()
    absent.daemon.running(absent.name)
    assert absent.alive()
    absent.daemon.vtpm("instance", "stop", absent.name)
    absent.daemon.vtpm("instance", "delete", "--yes", absent.name)
    with absent.connect() as sock:
        assert rest(sock) == b""


def test_an_instance_can_be_named_by_its_id_and_outlives_the_daemon(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    flags = ("--mssim-ports", json.dumps({own_daemon.running("vm-a").id: (port := free_pair())}))
    own_daemon.stop()
    own_daemon.start(*flags)
    simulator = Simulator(own_daemon, "vm-a", port, tmp_path)
    simulator.tool("tpm2_pcrextend", f"16:sha256={'ab' * 32}")
    before = simulator.pcr(16)
    own_daemon.stop()
    with pytest.raises(ConnectionRefusedError):
        simulator.connect()
    own_daemon.start(*flags)
    assert simulator.pcr(16) == before != ZEROS
    assert simulator.alive()


def test_a_port_that_is_taken_stops_the_start_and_says_which_setting() -> None:
    process, port = DaemonProcess(), free_pair()
    try:
        with socket.create_server(("127.0.0.1", port + 1)):
            process.launch("--mssim-ports", json.dumps({"vm-a": port}))
            assert process.wait_until_dead() == 2
        assert "MSSIM_PORT_UNUSABLE" in process.log_text()
        assert "mssim_ports" in process.log_text()
    finally:
        process.close()


def test_other_hosts_are_let_in_only_by_a_setting_and_with_a_warning() -> None:
    process, ports = DaemonProcess(), json.dumps({"vm-a": free_pair()})
    try:
        process.launch("--mssim-ports", ports, "--mssim-address", "0.0.0.0")
        assert process.wait_until_dead() == 2
        assert "mssim_allow_remote" in process.log_text()
        process.start("--mssim-ports", ports, "--mssim-address", "0.0.0.0", "--mssim-allow-remote", "true")
        assert "mssim.open_to_network" in process.log_text()
    finally:
        process.close()
