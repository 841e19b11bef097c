"""What a guest does with its TPM: tpm2-tools inside the VM, results outside."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tests.support.vm import Ran, Vm

# What OVMF and the kernel's boot stub measure.
BOOT_PCRS = (0, 1, 2, 3, 4, 5, 6, 7, 9)
# tpm2-tools take no more than eight into a policy.
SEALED_PCRS = (0, 2, 4, 5, 7, 9)
SEALED_HANDLE = "0x81000100"
NV_INDEX = "0x01500100"
_BOOT = "sha256:" + ",".join(map(str, BOOT_PCRS))
_SEALED = "sha256:" + ",".join(map(str, SEALED_PCRS))


def pcrs(vm: Vm, bank: str = "sha256") -> dict[int, bytes]:
    """PCR values by index, as the guest reads them."""
    values = vm.run(f"tpm2 pcrread -Q -o pcrs {bank}:all; cat pcrs")
    size = len(values) // 24
    return {index: values[index * size : (index + 1) * size] for index in range(24)}


def boot_pcrs(vm: Vm) -> dict[int, bytes]:
    """The PCRs that say what was booted."""
    values = pcrs(vm)
    return {index: values[index] for index in BOOT_PCRS}


def event_log(vm: Vm) -> bytes:
    """The firmware's event log, as the kernel keeps it."""
    return vm.run("cat /sys/kernel/security/tpm0/binary_bios_measurements")


def extend(vm: Vm, index: int) -> None:
    """Extend a PCR with a digest of ones."""
    vm.run(f"tpm2 pcrextend {index}:sha256={'11' * 32}")


@dataclass(frozen=True, slots=True)
class Clock:
    """TPMS_CLOCK_INFO in part (TPM 2.0 Library, Part 2, 10.11.1)."""

    reset_count: int
    restart_count: int


def clock(vm: Vm) -> Clock:
    """How often the TPM was reset, and resumed since."""
    text = vm.run("tpm2 readclock").decode()
    numbers = dict(line.split(":") for line in text.replace(" ", "").split() if ":" in line)
    return Clock(int(numbers["reset_count"]), int(numbers["restart_count"]))


def seal(vm: Vm, secret: str) -> None:
    """Seal a secret to SEALED_PCRS, in a persistent object."""
    vm.run(
        f"""
        tpm2 createprimary -Q -C o -G ecc -c primary
        tpm2 createpolicy -Q --policy-pcr -l {_SEALED} -L policy
        printf %s {secret} | tpm2 create -Q -C primary -L policy -i - -u sealed.pub -r sealed.priv
        tpm2 load -Q -C primary -u sealed.pub -r sealed.priv -c sealed
        tpm2 evictcontrol -Q -C o -c sealed {SEALED_HANDLE}
        """
    )


def unseal(vm: Vm) -> Ran:
    """Try to have the secret."""
    return vm.attempt(f"tpm2 unseal -c {SEALED_HANDLE} -p pcr:{_SEALED}")


def write_nv(vm: Vm, text: str) -> None:
    """Define an NV index and write into it."""
    vm.run(f"tpm2 nvdefine -Q {NV_INDEX} -C o -s {len(text)} -a 'ownerread|ownerwrite'")
    rewrite_nv(vm, text)


def rewrite_nv(vm: Vm, text: str) -> None:
    """Write into it again."""
    vm.run(f"printf %s '{text}' | tpm2 nvwrite -Q {NV_INDEX} -C o -i -")


def read_nv(vm: Vm) -> str:
    """What the NV index holds."""
    return vm.run(f"tpm2 nvread {NV_INDEX} -C o").decode()


@dataclass(frozen=True, slots=True)
class GuestQuote:
    """A quote over the boot's PCRs, made in the guest."""

    attest: bytes
    signature: bytes
    ak_pem: str


def make_ak(vm: Vm, ek: str) -> str:
    """Make an AK under the EK at a handle; return its name in hex."""
    return (
        vm.run(f"tpm2 createak -Q -C {ek} -c ak -G ecc -g sha256 -s ecdsa -n ak.name; xxd -p -c 100 ak.name").decode().strip()
    )


def quote(vm: Vm, nonce: bytes) -> GuestQuote:
    """Quote with the AK that was made."""
    sizes, _, data = vm.run(
        f"""
        tpm2 readpublic -Q -c ak -f pem -o ak.pem
        tpm2 quote -Q -c ak -l {_BOOT} -q {nonce.hex()} -g sha256 -m attest -s signature
        echo $(stat -c %s attest signature ak.pem)
        cat attest signature ak.pem
        """
    ).partition(b"\n")
    attest_size, signature_size, pem_size = map(int, sizes.split())
    attest, signature, pem = struct.unpack(f"{attest_size}s{signature_size}s{pem_size}s", data)
    return GuestQuote(attest, signature, pem.decode())


def activate(vm: Vm, ek: str, credential: bytes) -> Ran:
    """TPM2_ActivateCredential with the EK's policy; its output is the secret."""
    vm.put("credential", credential)
    return vm.attempt(
        f"""
        tpm2 startauthsession -Q --policy-session -S session
        tpm2 policysecret -Q -S session -c e
        tpm2 activatecredential -Q -c ak -C {ek} -i credential -o secret -P session:session
        tpm2 flushcontext session
        cat secret
        """
    )
