"""An extra of the service stands in nobody's way: a TPM that can have no AK runs, and its quotes are refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import Tool
from tests.integration.test_dropin import BOTH, OURS, PLAIN, READY, running, wait_until_listening
from tests.integration.test_out_of_band import ak_of, check, quote
from tests.support import raw
from tests.support.daemon import DaemonProcess
from tests.support.exchange import RUNNING, Swtpm
from tests.support.vmm import Vmm
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError
from vtpm.tpm.codes import TPM_RC_NV_SPACE, TPM_RC_RETRY, CommandCode, Tag
from vtpm.tpm.command import build
from vtpm.tpm.credential import flush_command
from vtpm.tpm.keys import AK_HANDLE, KeyAlgorithm, ak_template

Bind = Callable[[pb.Instance], Tool]
Run = Callable[[bytes], bytes]

HANDLE = hex(AK_HANDLE)
FIRST_INDEX, FIRST_PERSISTENT = 0x01100000, 0x81000100
# The last is smaller than any key, so that no key fits where it does not fit any more.
SIZES = (2048, 512, 64, 8)


def fill_nv(run: Run) -> list[int]:
    """Define indices until there is no room for the smallest, then make keys persistent; return the indices."""
    made: list[int] = []
    for size in SIZES:
        while True:
            index = FIRST_INDEX + len(made)
            rc = raw.rc_of(run(raw.nv_define(index, counter=False, size=size)))
            if rc == TPM_RC_RETRY:
                continue
            if rc == TPM_RC_NV_SPACE:
                break
            assert rc == 0, hex(rc)
            made.append(index)
    # Room for some persistent objects is left, whatever the indices take.
    made_primary = run(_create_primary())
    assert raw.rc_of(made_primary) == 0
    (key,) = struct.unpack_from(">I", made_primary, 10)
    for number in range(256):
        rc = raw.rc_of(run(_persist(key, FIRST_PERSISTENT + number)))
        if rc:
            assert rc == TPM_RC_NV_SPACE, hex(rc)
            break
    assert raw.rc_of(run(flush_command(key))) == 0
    return made


def _create_primary() -> bytes:
    """TPM2_CreatePrimary of a key of the owner."""
    public = ak_template(KeyAlgorithm.ECC_P256)
    body = struct.pack(">I", raw.OWNER) + raw.EMPTY_PASSWORD_AREA + struct.pack(">HHH", 4, 0, 0)
    return build(CommandCode.CreatePrimary, body + struct.pack(">H", len(public)) + public + bytes(6), Tag.SESSIONS)


def _persist(key: int, handle: int) -> bytes:
    """TPM2_EvictControl by the owner; of a persistent object it is its end."""
    body = struct.pack(">II", raw.OWNER, key) + raw.EMPTY_PASSWORD_AREA + struct.pack(">I", handle)
    return build(CommandCode.EvictControl, body, Tag.SESSIONS)


def refused(daemon: DaemonProcess, name: str) -> VtpmError:
    with pytest.raises(VtpmError) as error:
        quote(daemon, name)
    assert error.value.reason == "AK_MISSING"
    assert error.value.remedy
    return error.value


def started(daemon: DaemonProcess, name: str) -> Run:
    """Start it, with TPM2_Startup by the service."""
    tpm_socket = daemon.power_on(name).tpm_socket

    def run(command: bytes) -> bytes:
        with raw.connect(tpm_socket) as sock:
            return raw.ask(sock, command)

    return run


@pytest.fixture
def full(daemon: DaemonProcess, name: str, tool: Bind) -> Iterator[pb.Instance]:
    """An instance that is OFF, without an AK and with no room for one."""
    daemon.create(name)
    instance = daemon.power_on(name, pb.STARTUP_NONE)
    run = tool(instance)
    run("tpm2_startup", "-c")
    run("tpm2_evictcontrol", "-C", "p", "-c", HANDLE)
    with raw.connect(instance.tpm_socket) as sock:
        fill_nv(lambda command: raw.ask(sock, command))
    daemon.vtpm("instance", "stop", name)
    yield instance
    daemon.vtpm("instance", "stop", name)


def test_a_tpm_whose_nv_is_full_runs_and_gets_its_ak_when_there_is_room(daemon: DaemonProcess, full: pb.Instance) -> None:
    run = started(daemon, full.name)
    assert raw.rc_of(run(raw.pcr_read(0))) == 0
    assert "TPM_RC_NV_SPACE" in refused(daemon, full.name).message
    # Nothing of the trial is left behind.
    assert handles(run, 0x80000000) == []
    daemon.hibernate(full.name)
    assert "TPM_RC_NV_SPACE" in refused(daemon, full.name).message
    daemon.vtpm("instance", "reset", full.name, "--startup", "clear")
    assert "TPM_RC_NV_SPACE" in refused(daemon, full.name).message
    assert raw.rc_of(run(_persist(FIRST_PERSISTENT, FIRST_PERSISTENT))) == 0
    daemon.hibernate(full.name)
    # The remedy that the error names.
    daemon.vtpm("instance", "reset", full.name, "--startup", "clear")
    check(quote(daemon, full.name), ak_of(full))


def handles(run: Run, first: int) -> list[int]:
    """TPM2_GetCapability(TPM_CAP_HANDLES)."""
    response = run(build(CommandCode.GetCapability, struct.pack(">III", 1, first, 64)))
    assert raw.rc_of(response) == 0
    (count,) = struct.unpack_from(">I", response, 15)
    return list(struct.unpack_from(f">{count}I", response, 19))


def test_a_state_whose_nv_is_full_is_imported(daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "old", *RUNNING) as tpm:
        wait_until_listening(tpm.path)
        with raw.connect(tpm.path) as sock:
            fill_nv(lambda command: raw.ask(sock, command))
    daemon.vtpm("instance", "import", name, "--from-swtpm", str(tmp_path / "old"))
    run = started(daemon, name)
    assert "TPM_RC_NV_SPACE" in refused(daemon, name).message
    assert not any(key.role == pb.AK for key in daemon.get(name).keys)
    assert raw.rc_of(run(_persist(FIRST_PERSISTENT, FIRST_PERSISTENT))) == 0
    daemon.vtpm("instance", "reset", name, "--startup", "clear")
    response = quote(daemon, name)
    check(response, ak_of(daemon.get(name)))


@BOTH
def test_a_full_tpm_of_either_program_starts_again_in_the_other(program: str, tmp_path: Path) -> None:
    with running(program, tmp_path, *READY) as tpm:
        with raw.connect(tpm.data) as sock:
            indices = fill_nv(lambda command: raw.ask(sock, command))
        tpm.shut_down()
    for again in (PLAIN, OURS):
        with running(again, tmp_path, *READY) as tpm:
            with raw.connect(tpm.data) as sock:
                assert handles(lambda command: raw.ask(sock, command), FIRST_INDEX)[:64] == indices[:64]
            tpm.shut_down()


def test_an_ak_that_was_evicted_is_made_again(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    daemon.create(name)
    instance = daemon.power_on(name, pb.STARTUP_NONE)
    run = tool(instance)
    run("tpm2_startup", "-c")
    run("tpm2_evictcontrol", "-C", "p", "-c", HANDLE)
    error = refused(daemon, name)
    assert "removed with platform authorization" in error.message
    assert f"vtpm instance start {name} --startup clear" in error.remedy
    daemon.vtpm("instance", "stop", name)
    daemon.vtpm("instance", "start", name, "--startup", "clear")
    check(quote(daemon, name), ak_of(instance))


def test_a_disabled_platform_hierarchy_is_named(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    daemon.create(name)
    run = tool(daemon.power_on(name, pb.STARTUP_NONE))
    run("tpm2_startup", "-c")
    run("tpm2_hierarchycontrol", "-C", "p", "phEnable", "clear")
    assert "has disabled the platform hierarchy" in refused(daemon, name).message


def test_a_state_that_a_vm_brought_along_is_named(daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "old", *RUNNING) as tpm:
        elsewhere = Vmm(tpm.control)
        states = [(kind, elsewhere.get_state(kind)) for kind in (1, 2)]
        elsewhere.close()
    machine = Vmm(daemon.create(name).control_socket)
    machine.give_data_channel()
    machine.ask(14)
    assert [machine.set_state(kind, blob) for kind, blob in states] == [0, 0]
    assert machine.ask(2, bytes(4)) == bytes(4)
    assert raw.rc_of(machine.tpm(raw.pcr_read(0))) == 0
    assert "has put another TPM's state" in refused(daemon, name).message
    machine.close()
    daemon.until(name, pb.OFF)
    with raw.connect(daemon.power_on(name, pb.STARTUP_NONE).tpm_socket) as sock:
        raw.succeed(sock, raw.startup_clear())
    assert "came from elsewhere" in refused(daemon, name).message
    daemon.vtpm("instance", "stop", name)
    daemon.power_on(name)
    response = quote(daemon, name)
    check(response, ak_of(daemon.get(name)))


def test_an_object_of_another_kind_at_an_eks_handle_hides_no_keys(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    run = tool(daemon.running(name))
    attributes = "sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth"
    run("tpm2_createprimary", "-C", "o", "-G", "hmac", "-a", attributes, "-c", "hash.ctx")
    run("tpm2_evictcontrol", "-C", "o", "-c", "hash.ctx", "0x81010001")
    run("tpm2_evictcontrol", "-C", "o", "-c", "0x81010002")
    eventually(lambda: any(key.role == pb.EK and key.handle == 0 for key in daemon.get(name).keys))
