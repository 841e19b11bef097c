"""What a new TPM is made with, checked by tpm2-tools from the inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.integration.conftest import Tool
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb

Bind = Callable[[pb.Instance], Tool]

# How `tpm2_createek -G` calls the TCG template of each kind.
EK_KINDS = [
    (pb.RSA_2048, 0x81010001, "rsa"),
    (pb.RSA_3072, 0x8101001C, "rsa3072"),
    (pb.ECC_P256, 0x81010002, "ecc"),
    (pb.ECC_P384, 0x81010016, "ecc384"),
]


def key_of(instance: pb.Instance, role: pb.KeyRole.ValueType) -> pb.Key:
    return next(key for key in instance.keys if key.role == role)


@pytest.mark.parametrize(("algorithm", "handle", "tools_name"), EK_KINDS)
def test_an_ek_is_what_its_tcg_template_makes(
    daemon: DaemonProcess,
    name: str,
    tool: Bind,
    tmp_path: Path,
    algorithm: pb.KeyAlgorithm.ValueType,
    handle: int,
    tools_name: str,
) -> None:
    instance = daemon.running(name, profile=pb.Profile(ek_algorithms=[algorithm]))
    run = tool(instance)
    ek = key_of(instance, pb.EK)
    assert ek.handle == handle
    run("tpm2_readpublic", "-c", hex(handle), "-f", "pem", "-o", "persistent.pem")
    assert (tmp_path / "persistent.pem").read_text().strip() == ek.public_pem.strip()
    made = run("tpm2_createek", "-c", "made.ctx", "-G", tools_name, "-u", "made.pem", "-f", "pem", check=False)
    if made.returncode and b"nsupported" in made.stderr + made.stdout:
        pytest.skip(f"this tpm2_createek knows no {tools_name}")
    assert made.returncode == 0, made.stderr
    # Primary keys are derived from seed and template, so an equal key means an equal template.
    assert (tmp_path / "made.pem").read_text().strip() == ek.public_pem.strip()


def test_the_default_profile(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    instance = daemon.running(name, profile=pb.Profile())
    assert [(key.role, key.algorithm) for key in instance.keys] == [
        (pb.EK, pb.RSA_2048), (pb.EK, pb.ECC_P384), (pb.AK, pb.ECC_P256),
    ]  # fmt: skip
    assert list(instance.profile.pcr_banks) == [pb.SHA256, pb.SHA384]
    handles = tool(instance)("tpm2_getcap", "handles-persistent").stdout.decode().split()
    assert [handle for handle in handles if handle.startswith("0x")] == ["0x81010001", "0x81010016", "0x81800003"]
    assert b"0x" not in tool(instance)("tpm2_getcap", "handles-transient").stdout
    public = serialization.load_pem_public_key(key_of(instance, pb.AK).public_pem.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.curve.name == "secp256r1"


@pytest.mark.parametrize("banks", [["SHA1"], ["SHA256"], ["SHA1", "SHA512"], ["SHA1", "SHA256", "SHA384", "SHA512"]])
def test_chosen_pcr_banks_are_allocated_and_the_others_not(
    daemon: DaemonProcess, name: str, tool: Bind, banks: list[str]
) -> None:
    profile = pb.Profile(ek_algorithms=[pb.ECC_P256], pcr_banks=[pb.PcrBank.Value(bank) for bank in banks])
    pcrs = tool(daemon.running(name, profile=profile))("tpm2_getcap", "pcrs").stdout.decode().lower()
    allocated = {line.split(":")[0].strip(" -") for line in pcrs.splitlines() if "[ 0, 1" in line}
    assert allocated == {bank.lower() for bank in banks}


def test_an_rsa_ak_signs_quotes_too(daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    instance = daemon.running(name, profile=pb.Profile(ek_algorithms=[pb.ECC_P256], ak_algorithm=pb.RSA_2048))
    assert isinstance(serialization.load_pem_public_key(key_of(instance, pb.AK).public_pem.encode()), rsa.RSAPublicKey)
    daemon.vtpm("quote", name, "--pcrs", "sha256:all", "--nonce", "00ff", "--out", str(tmp_path))
    import subprocess

    check = ["tpm2_checkquote", "-u", "ak.pem", "-m", "quote.msg", "-s", "quote.sig", "-f", "pcrs.bin", "-g", "sha256"]
    subprocess.run([*check, "-q", "00ff"], cwd=tmp_path, check=True, capture_output=True)


def test_seeds_are_made_by_each_tpm_for_itself(daemon: DaemonProcess, name: str) -> None:
    instances = [daemon.create(f"{name}-{number}") for number in range(4)]
    assert len({key.public_pem for instance in instances for key in instance.keys}) == 8


def test_the_ak_is_a_restricted_signing_key_that_the_guest_cannot_evict(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    run = tool(daemon.running(name))
    public = run("tpm2_readpublic", "-c", "0x81800003").stdout.decode()
    attributes = next(line for line in public.splitlines() if "fixedtpm" in line)
    assert {"restricted", "sign", "fixedtpm", "fixedparent"} <= set(attributes.replace("|", " ").split())
    assert "decrypt" not in attributes
    for hierarchy in "op":
        assert run("tpm2_evictcontrol", "-C", hierarchy, "-c", "0x81800003", check=False).returncode
    run("tpm2_clear", "-c", "l")
    assert "0x81800003" in run("tpm2_getcap", "handles-persistent").stdout.decode()
