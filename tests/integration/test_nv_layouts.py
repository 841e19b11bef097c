"""A guest made for a cloud finds what it looks for, in that cloud's places."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.integration.conftest import Tool
from tests.support.certs import certificates, chain
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2

Bind = Callable[[pb.Instance], Tool]
HARDWARE_REPORT = slice(32, 32 + 1184)


def pem_of(der: bytes) -> str:
    key = x509.load_der_x509_certificate(der).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def azure(daemon: DaemonProcess, name: str) -> pb.Instance:
    return daemon.running(name, profile=pb.Profile(ek_algorithms=[pb.RSA_2048], nv_layout=pb.AZURE))


def test_azure_has_an_ak_its_certificate_and_a_report(daemon: DaemonProcess, name: str, tool: Bind, tmp_path: Path) -> None:
    instance = azure(daemon, name)
    run = tool(instance)
    der = certificates(daemon, name)["GUEST_AK", "RSA_2048"].der
    contents = run("tpm2_nvread", "0x01C101D0", "-C", "o").stdout
    assert contents.startswith(der)
    assert not contents[len(der) :].strip(b"\0")
    x509.load_der_x509_certificate(der).verify_directly_issued_by(chain(daemon)[0])
    assert daemon.vtpm("instance", "cert", name, "--kind", "guest-ak", "--format", "der").stdout == der
    run("tpm2_readpublic", "-c", "0x81000003", "-f", "pem", "-o", "ak.pem")
    assert (tmp_path / "ak.pem").read_text() == pem_of(der)
    quote = ("-l", "sha256:0,7", "-q", "abcd", "-m", "msg", "-s", "sig", "-g", "sha256")
    run("tpm2_quote", "-c", "0x81000003", *quote)
    run("tpm2_checkquote", "-u", "ak.pem", "-m", "msg", "-s", "sig", "-g", "sha256", "-q", "abcd")
    attributes = run("tpm2_nvreadpublic", "0x01C101D0").stdout.decode()
    assert "authwrite|ownerread|authread|no_da|written|platformcreate" in attributes


def claims_of(report: bytes) -> dict[str, Any]:
    """As the agents there take a report apart."""
    signature, version, size, request, status = struct.unpack_from("<IIIII", report)
    assert (signature, version, request, status) == (0x414C4348, 2, 2, 0)
    assert report[HARDWARE_REPORT] == bytes(1184)
    data_size, request_version, kind, hash_type, claims_size = struct.unpack_from("<IIIII", report, 1216)
    assert (request_version, kind, hash_type) == (1, 3, 1)
    assert data_size == 20 + claims_size
    assert size == 1236 + claims_size
    claims: dict[str, Any] = json.loads(report[1236 : 1236 + claims_size])
    return claims


def test_the_report_holds_the_ak_and_follows_the_user_data(
    daemon: DaemonProcess, name: str, tool: Bind, tmp_path: Path
) -> None:
    instance = azure(daemon, name)
    run = tool(instance)
    claims = claims_of(run("tpm2_nvread", "0x01400001", "-C", "o").stdout)
    (ak,) = claims["keys"]
    certificate = x509.load_der_x509_certificate(certificates(daemon, name)["GUEST_AK", "RSA_2048"].der)
    key = certificate.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    assert ak["kid"] == "HCLAkPub"
    assert int.from_bytes(base64.urlsafe_b64decode(ak["n"] + "=="), "big") == key.public_numbers().n
    assert claims["vm-configuration"]["vmUniqueId"].lower() == instance.id
    assert claims["user-data"] == "0" * 128
    for filler in (b"\xab", b"\x01"):
        (tmp_path / "data").write_bytes(filler * 64)
        run("tpm2_nvwrite", "0x01400002", "-C", "o", "-i", "data")
        claims = claims_of(run("tpm2_nvread", "0x01400001", "-C", "o").stdout)
        assert str(claims["user-data"]).lower() == (filler * 64).hex()
    # It is durable, and the guest can't write it itself.
    daemon.vtpm("instance", "stop", name)
    run = tool(daemon.power_on(name))
    assert str(claims_of(run("tpm2_nvread", "0x01400001", "-C", "o").stdout)["user-data"]) == (b"\x01" * 64).hex()
    assert run("tpm2_nvwrite", "0x01400001", "-C", "o", "-i", "data", check=False).returncode
    assert run("tpm2_nvwrite", "0x01400001", "-i", "data", check=False).returncode


def test_the_service_s_own_quotes_are_as_ever(daemon: DaemonProcess, name: str) -> None:
    azure(daemon, name)
    quote = daemon.client.call(daemon.client.tpm.Quote, tpm_pb2.QuoteRequest(instance=name, nonce=b"fresh"))
    assert quote.ak_public_pem == pem_of(certificates(daemon, name)["AK", "ECC_P256"].der)


def test_gce_has_templates_that_make_the_certified_aks(daemon: DaemonProcess, name: str, tool: Bind, tmp_path: Path) -> None:
    instance = daemon.running(name, profile=pb.Profile(nv_layout=pb.GCE))
    assert list(instance.profile.ek_algorithms) == [pb.RSA_2048, pb.ECC_P256]
    run = tool(instance)
    known = certificates(daemon, name)
    assert run("tpm2_nvread", "0x01C00002").stdout == known["EK", "RSA_2048"].der
    assert run("tpm2_nvread", "0x01C0000A").stdout == known["EK", "ECC_P256"].der
    for algorithm, index in (("RSA_2048", 0x01C10000), ("ECC_P256", 0x01C10002)):
        der = known["GUEST_AK", algorithm].der
        assert run("tpm2_nvread", hex(index), "-C", "o").stdout.startswith(der)
        template = run("tpm2_nvread", hex(index + 1)).stdout
        public = tmp_path / "made.pem"
        make_from_template(instance, template, public)
        assert public.read_text() == pem_of(der)
    for kind in ("handles-transient", "handles-loaded-session", "handles-saved-session"):
        assert run("tpm2_getcap", kind).stdout == b""


def make_from_template(instance: pb.Instance, template: bytes, public: Path) -> None:
    """CreatePrimary in the endorsement hierarchy with the template, as go-tpm-tools does."""
    from tpm2_pytss import ESAPI, TCTILdr
    from tpm2_pytss.constants import ESYS_TR
    from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_PUBLIC

    with TCTILdr("swtpm", f"path={instance.tpm_socket}") as tcti, ESAPI(tcti) as esapi:
        area = TPM2B_PUBLIC(TPMT_PUBLIC.unmarshal(template)[0])
        handle, made, *_ = esapi.create_primary(TPM2B_SENSITIVE_CREATE(), area, ESYS_TR.ENDORSEMENT)
        public.write_bytes(made.to_pem())
        esapi.flush_context(handle)
