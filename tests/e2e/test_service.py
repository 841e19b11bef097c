"""The service inside a VM, whose kernel has what hosts may lack: AF_VSOCK with a peer, and TPMs that user space serves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.quote import QuoteRefusedError, verify
from tests.support.vmassets import Assets, AssetsUnavailableError
from tests.support.vmservice import ServiceVm, build

NONCE = b"fresh for this run"
# The proxy's client; the guest's programs are outside of the disk.
DEVICE = "export TPM2TOOLS_TCTI=device:/dev/tpm0"
MADE = re.compile(r"New TPM device: /dev/tpm0 \(major/minor = \d+/\d+\)\n")


@pytest.fixture(scope="module")
def vm(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceVm]:
    """A VM that can run the service."""
    try:
        machine = build(assets, tmp_path_factory.mktemp("vm"))
    except AssetsUnavailableError as error:
        pytest.skip(f"no VM to test with: {error}")
    with machine:
        machine.boot()
        machine.start_service()
        yield machine


@pytest.fixture(scope="module")
def spoken(vm: ServiceVm) -> dict[str, Any]:
    """What a client in the VM was told over AF_VSOCK, with and without an assignment."""
    told: dict[str, Any] = json.loads(vm.run(vm.python(f"/code/service/speak.py {NONCE.hex()}"), timeout_s=300))
    return told


def test_a_quote_over_vsock_verifies(spoken: dict[str, Any]) -> None:
    attest, signature = bytes.fromhex(spoken["attest"]), bytes.fromhex(spoken["signature"])
    pcr = bytes.fromhex(spoken["pcr"])
    assert pcr != bytes(32)
    assert spoken["pcr"] == spoken["asked"]
    verify(attest, signature, spoken["ak"], nonce=NONCE, pcrs=[pcr])
    with pytest.raises(QuoteRefusedError, match="nonce"):
        verify(attest, signature, spoken["ak"], nonce=NONCE[::-1], pcrs=[pcr])


def test_a_cid_without_an_assignment_is_refused(spoken: dict[str, Any]) -> None:
    assert spoken["status"] == 0
    assert spoken["stranger"] == ""
    unknown = [line for line in spoken["log"] if line["event"] == "vsock.cid_unknown"]
    assert [line["cid"] for line in unknown] == [1]
    assert [line["port"] for line in spoken["log"] if line["event"] == "vsock.listening"] == [7000, 7000]


def starting(vm: ServiceVm, program: str, state: Path) -> str:
    """A script that starts a TPM for /dev/tpm0 and waits until it is there; $pid is its process.

    The kernel gives up on a TPM whose self-test takes longer than 2 s, as an emulated one's may while the machine is busy.
    """
    command = vm.python("-m vtpm.cli.dropin") if program == "ours" else vm.inside("/bin/swtpm")
    return f"""
        for attempt in 1 2 3 4 5 6; do
            {command} chardev --vtpm-proxy --tpm2 --tpmstate dir={state} >made 2>said &
            pid=$!
            until [ -c /dev/tpm0 ] || ! kill -0 $pid 2>/dev/null; do usleep 20000; done
            [ -c /dev/tpm0 ] && break
        done
        if [ ! -c /dev/tpm0 ]; then cat said >&2; exit 1; fi
    """


def test_the_kernels_tpm_is_served_as_by_swtpm(vm: ServiceVm) -> None:
    """Each goes on with what the other wrote, by tpm2-tools on the kernel's device."""
    vm.run(f"mkdir -p {vm.tmp}/proxy")
    for turn, program in enumerate(("ours", "swtpm", "ours")):
        first = "tpm2 nvdefine -Q 0x1500001 -C o -s 8"
        read = "tpm2 nvread 0x1500001 -C o"
        out = vm.run(
            f"""
            {starting(vm, program, Path("/tmp/proxy"))}
            {DEVICE}
            {first if turn == 0 else read}
            printf '%08d' {turn} >nv
            tpm2 nvwrite -Q 0x1500001 -C o -i nv
            tpm2 pcrextend 16:sha256={"11" * 32}
            cat made
            kill $pid
            wait $pid || echo "status $?"
            while [ -e /dev/tpm0 ]; do usleep 20000; done
            """
        ).decode()
        assert MADE.search(out), out
        assert "status" not in out
        assert turn == 0 or out.startswith(f"{turn - 1:08d}")


def test_localities_come_through_the_proxy(vm: ServiceVm) -> None:
    # The kernel speaks at locality 0, which may not reset PCR 20; it says so by the vendor command that the proxy allows.
    ran = vm.run(
        f"""
        mkdir -p {vm.tmp}/locality
        {starting(vm, "ours", Path("/tmp/locality"))}
        {DEVICE}
        tpm2 pcrreset 20 2>refusal && exit 1
        tpm2 pcrreset 16
        kill $pid
        wait $pid
        cat refusal
        """
    )
    assert b"0x907" in ran
