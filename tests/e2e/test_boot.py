"""A measured boot, and what can be proven about it from inside and from outside."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.support import quote, vmguest
from tests.support.vm import Vm, VmError
from tests.support.vmassets import Assets
from tests.support.vmpeers import OurTpm, Peer
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.tpm.eventlog import parse_event_log, replay
from vtpm.tpm.pcr import PcrBank

EK = "0x81010001"


@pytest.fixture(scope="module")
def ek_pem(vm: Vm, tpm: Peer) -> str:
    """The EK at EK: as the service names it, or made as a guest makes it."""
    if isinstance(tpm, OurTpm):
        (key,) = [key for key in tpm.instance.keys if key.role == pb.EK and key.algorithm == pb.RSA_2048]
        assert f"{key.handle:#x}" == EK
        return key.public_pem
    vm.run(f"tpm2 createek -Q -c {EK} -G rsa -u ek.pub; tpm2 readpublic -Q -c {EK} -f pem -o ek.pem")
    return vm.run("cat ek.pem").decode()


@pytest.fixture(scope="module")
def ak_name(vm: Vm, ek_pem: str) -> str:
    """An AK in the guest; its name."""
    return vmguest.make_ak(vm, EK)


@pytest.mark.parametrize("bank", [PcrBank.SHA256, PcrBank.SHA384])
def test_the_event_log_replays_to_the_pcrs(vm: Vm, bank: PcrBank) -> None:
    events = parse_event_log(vmguest.event_log(vm))
    read = vmguest.pcrs(vm, bank.hash_name)
    replayed = replay(events, bank)
    assert set(replayed) == set(vmguest.BOOT_PCRS)
    assert replayed == {index: read[index] for index in replayed}
    assert replay(events[:-1], bank) != replayed, "one event less is noticed"


def test_another_reader_of_event_logs_agrees(vm: Vm, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(vmguest.event_log(vm))
    text = subprocess.run(["tpm2_eventlog", str(tmp_path / "log")], check=True, capture_output=True, text=True).stdout
    replayed = text.partition("pcrs:")[2].lower()
    for index, value in vmguest.boot_pcrs(vm).items():
        assert f"{index:<2} : 0x{value.hex()}" in replayed


def test_what_was_booted_is_in_the_log(vm: Vm, assets: Assets) -> None:
    measured = {(event.pcr, event.digests[PcrBank.SHA256.alg_id]) for event in parse_event_log(vmguest.event_log(vm))}
    assert (9, hashlib.sha256(assets.initrd.read_bytes()).digest()) in measured


@pytest.mark.parametrize("bank", ["sha256", "sha384"])
def test_the_service_reads_what_the_guest_reads(vm: Vm, service: OurTpm, bank: str) -> None:
    before = service.pcrs(bank)
    assert before == vmguest.pcrs(vm, bank)
    vmguest.extend(vm, 16)
    assert service.pcrs("sha256") == vmguest.pcrs(vm) != before


def test_a_quote_from_inside_is_verified_outside(vm: Vm, ak_name: str) -> None:
    values = list(vmguest.boot_pcrs(vm).values())
    made = vmguest.quote(vm, b"nonce 1")
    assert quote.verify(made.attest, made.signature, made.ak_pem, nonce=b"nonce 1", pcrs=values).nonce == b"nonce 1"
    with pytest.raises(quote.QuoteRefusedError, match="nonce"):
        quote.verify(made.attest, made.signature, made.ak_pem, nonce=b"nonce 2", pcrs=values)
    with pytest.raises(quote.QuoteRefusedError, match="pcr digest"):
        quote.verify(made.attest, made.signature, made.ak_pem, nonce=b"nonce 1", pcrs=values[::-1])


def test_a_quote_by_the_service_covers_the_same_pcrs(vm: Vm, service: OurTpm) -> None:
    values = list(vmguest.boot_pcrs(vm).values())
    made = service.quote(b"nonce 3", list(vmguest.BOOT_PCRS))
    quote.verify(made.attest, made.signature, made.ak_public_pem, nonce=b"nonce 3", pcrs=values)
    (ak,) = [key for key in service.instance.keys if key.role == pb.AK]
    assert ak.public_pem == made.ak_public_pem


def credential(directory: Path, ek_pem: str, name: str, secret: bytes) -> bytes:
    """TPM2_MakeCredential, without a TPM."""
    (directory / "ek.pem").write_text(ek_pem)
    (directory / "secret").write_bytes(secret)
    command = [
        "tpm2_makecredential",
        "-Q",
        "-T",
        "none",
        "-G",
        "rsa",
        "-u",
        "ek.pem",
        "-s",
        "secret",
        "-n",
        name,
        "-o",
        "credential",
    ]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    return (directory / "credential").read_bytes()


def test_a_credential_opens_for_the_ak_that_lives_beside_the_ek(vm: Vm, ek_pem: str, ak_name: str, tmp_path: Path) -> None:
    for_us = vmguest.activate(vm, EK, credential(tmp_path, ek_pem, ak_name, b"32 bytes, known to the verifier."))
    assert (for_us.status, for_us.out) == (0, b"32 bytes, known to the verifier."), for_us.err
    other_name = ak_name[:-2] + f"{int(ak_name[-2:], 16) ^ 1:02x}"
    for_another = vmguest.activate(vm, EK, credential(tmp_path, ek_pem, other_name, b"not for this AK"))
    assert for_another.status != 0
    assert b"not for this AK" not in for_another.out


def test_a_second_vm_is_refused_and_the_first_runs_on(
    vm: Vm, tpm: Peer, service: OurTpm, assets: Assets, tmp_path: Path
) -> None:
    before = service.pcrs()
    with Vm(assets, tpm, tmp_path / "second", counted=False) as second:
        with pytest.raises(VmError, match="did not start") as refused:
            second.start()
        assert "tpm-emulator" in str(refused.value)
    assert vmguest.pcrs(vm) == service.pcrs() == before
    assert service.instance.state == pb.ON
