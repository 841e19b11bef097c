"""What a guest finds in its TPM, what the API says of it, and what a relying party can check."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.integration.conftest import Tool
from tests.support.certs import certificates, chain, revoked_serials
from tests.support.daemon import DaemonProcess
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.errors import VtpmError
from vtpm.tpm.credential import make_credential
from vtpm.tpm.keys import name_of

Bind = Callable[[pb.Instance], Tool]

ALL_EKS = [pb.RSA_2048, pb.RSA_3072, pb.ECC_P256, pb.ECC_P384]
EK_INDICES = {"RSA_2048": 0x01C00002, "ECC_P256": 0x01C0000A, "ECC_P384": 0x01C00016, "RSA_3072": 0x01C0001C}
PLATFORM_INDEX = 0x01C08000
AK_INDEX = 0x01C10002
LOCKED = "ppwrite|writelocked|writedefine|ppread|ownerread|authread|no_da|written|platformcreate"


@pytest.fixture(scope="module")
def certified(daemon: DaemonProcess) -> pb.Instance:
    """An instance that is ON, with every kind of EK."""
    return daemon.running("certified", profile=pb.Profile(ek_algorithms=ALL_EKS))


def nv_read(run: Tool, index: int, *options: str) -> bytes:
    return run("tpm2_nvread", hex(index), *options).stdout


def test_the_instance_says_that_it_is_certified(certified: pb.Instance) -> None:
    assert certified.identity == pb.CERTIFIED
    assert certified.profile.nv_layout == pb.TCG


@pytest.mark.parametrize(("algorithm", "index"), EK_INDICES.items())
def test_the_guest_reads_the_same_ek_certificate_as_the_api_gives(
    daemon: DaemonProcess, certified: pb.Instance, tool: Bind, algorithm: str, index: int
) -> None:
    run = tool(certified)
    der = certificates(daemon, certified.name)["EK", algorithm].der
    assert nv_read(run, index) == der
    assert nv_read(run, index, "-C", "o") == der
    certificate = x509.load_der_x509_certificate(der)
    certificate.verify_directly_issued_by(chain(daemon)[0])
    key = next(key for key in certified.keys if key.role == pb.EK and pb.KeyAlgorithm.Name(key.algorithm) == algorithm)
    public = certificate.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert public.decode() == key.public_pem
    assert LOCKED in run("tpm2_nvreadpublic", hex(index)).stdout.decode()


def test_tpm2_getekcertificate_finds_them(daemon: DaemonProcess, certified: pb.Instance, tool: Bind, tmp_path: Path) -> None:
    tool(certified)("tpm2_getekcertificate", "-o", "rsa.der", "-o", "ecc.der")
    known = certificates(daemon, certified.name)
    assert (tmp_path / "rsa.der").read_bytes() == known["EK", "RSA_2048"].der
    assert (tmp_path / "ecc.der").read_bytes() == known["EK", "ECC_P256"].der


def test_the_platform_certificate_is_there_and_nobody_rewrites_it(
    daemon: DaemonProcess, certified: pb.Instance, tool: Bind, tmp_path: Path
) -> None:
    run = tool(certified)
    assert nv_read(run, PLATFORM_INDEX) == certificates(daemon, certified.name)["PLATFORM", ""].der
    (tmp_path / "zeros").write_bytes(bytes(16))
    for index in (PLATFORM_INDEX, *EK_INDICES.values(), AK_INDEX):
        for who in (hex(index), "o"):
            assert run("tpm2_nvwrite", hex(index), "-C", who, "-i", "zeros", check=False).returncode
        assert run("tpm2_nvundefine", hex(index), check=False).returncode


def test_the_ak_certificate_is_there_for_the_owner_with_zeros_behind_it(
    daemon: DaemonProcess, certified: pb.Instance, tool: Bind
) -> None:
    der = certificates(daemon, certified.name)["AK", "ECC_P256"].der
    contents = nv_read(tool(certified), AK_INDEX, "-C", "o")
    assert contents.startswith(der)
    assert not contents[len(der) :].strip(b"\0")
    certificate = x509.load_der_x509_certificate(der)
    certificate.verify_directly_issued_by(chain(daemon)[0])
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert any(certified.id in uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier))


def test_a_quote_verifies_under_the_certified_ak(daemon: DaemonProcess, certified: pb.Instance) -> None:
    request = tpm_pb2.QuoteRequest(instance=certified.name, nonce=b"fresh")
    quote = daemon.client.call(daemon.client.tpm.Quote, request)
    certificate = x509.load_der_x509_certificate(certificates(daemon, certified.name)["AK", "ECC_P256"].der)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    assert pem == quote.ak_public_pem


def test_nothing_transient_is_left(certified: pb.Instance, tool: Bind) -> None:
    run = tool(certified)
    for kind in ("handles-transient", "handles-loaded-session", "handles-saved-session"):
        assert run("tpm2_getcap", kind).stdout == b""


def blob_for_tools(blob: bytes, secret: bytes) -> bytes:
    """The file of tpm2_makecredential: magic, version, TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET."""
    return struct.pack(">IIH", 0xBADCC0DE, 1, len(blob)) + blob + struct.pack(">H", len(secret)) + secret


@pytest.mark.parametrize(("algorithm", "handle"), [("RSA_2048", 0x81010001), ("ECC_P256", 0x81010002)])
def test_our_credentials_are_opened_by_tpm2_tools(
    certified: pb.Instance, tool: Bind, tmp_path: Path, algorithm: str, handle: int
) -> None:
    """And with a wrong Name they are not."""
    run = tool(certified)
    run(
        "tpm2_createak",
        "-C",
        hex(handle),
        "-c",
        "ak.ctx",
        "-G",
        "ecc",
        "-g",
        "sha256",
        "-s",
        "ecdsa",
        "-u",
        "ak.pub",
        "-f",
        "tss",
    )
    run("tpm2_flushcontext", "-t")
    ak = (tmp_path / "ak.pub").read_bytes()[2:]
    ek = next(key for key in certified.keys if key.role == pb.EK and pb.KeyAlgorithm.Name(key.algorithm) == algorithm)
    for name, works in ((name_of(ak), True), (name_of(ek.tpmt_public), False)):
        made = make_credential(ek.tpmt_public, name, b"the secret")
        (tmp_path / "blob").write_bytes(blob_for_tools(made.blob, made.encrypted_secret))
        run("tpm2_startauthsession", "--policy-session", "-S", "session.ctx")
        run("tpm2_policysecret", "-S", "session.ctx", "-c", "e")
        done = run(
            *(
                "tpm2_activatecredential",
                "-c",
                "ak.ctx",
                "-C",
                hex(handle),
                "-i",
                "blob",
                "-o",
                "secret",
                "-P",
                "session:session.ctx",
            ),
            check=False,
        )
        run("tpm2_flushcontext", "session.ctx", check=False)
        run("tpm2_flushcontext", "-t")
        assert (done.returncode == 0) is works
        if works:
            assert (tmp_path / "secret").read_bytes() == b"the secret"
            (tmp_path / "secret").unlink()


def test_a_clear_leaves_the_certificates_and_quotes_still_work(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    instance = daemon.running(name)
    before = certificates(daemon, name)
    run = tool(instance)
    run("tpm2_clear", "-c", "l")
    assert nv_read(run, EK_INDICES["ECC_P256"]) == before["EK", "ECC_P256"].der
    daemon.client.call(daemon.client.tpm.Quote, tpm_pb2.QuoteRequest(instance=name, nonce=b"fresh"))

    def evicted() -> bool:
        return any(key.role == pb.EK and key.handle == 0 for key in daemon.get(name).keys)

    eventually(evicted)
    assert b"EK ECC_P256 not persistent" in daemon.vtpm("instance", "show", name).stdout
    assert daemon.get(name).identity == pb.CERTIFIED
    assert not {int(item.serial, 16) for item in before.values()} & revoked_serials(daemon)
    # The same template makes the same key again.
    run("tpm2_createek", "-c", "0x81010002", "-G", "ecc", "-u", "made.pem", "-f", "pem")
    eventually(lambda: not evicted())


def test_a_new_endorsement_seed_ends_the_ek_certificates(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    """As firmware can, which has platform authorization: the guest starts its TPM itself here."""
    daemon.create(name)
    instance = daemon.power_on(name, pb.STARTUP_NONE)
    before = certificates(daemon, name)
    run = tool(instance)
    run("tpm2_startup", "-c")
    run("tpm2_changeeps")
    eventually(lambda: daemon.get(name).identity == pb.CHANGED)
    changed = daemon.get(name)
    assert [key.role for key in changed.keys] == [pb.AK]
    revoked = {kind for kind, item in before.items() if int(item.serial, 16) in revoked_serials(daemon)}
    assert revoked == {("EK", "ECC_P256"), ("PLATFORM", "")}
    shown = daemon.vtpm("instance", "show", name).stdout.decode()
    assert "CHANGED" in shown
    reason = certificates(daemon, name)["EK", "ECC_P256"].revocation_reason
    assert reason == "cessationOfOperation"


def test_a_new_platform_seed_ends_the_ak_certificate(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    daemon.create(name)
    instance = daemon.power_on(name, pb.STARTUP_NONE)
    before = certificates(daemon, name)
    run = tool(instance)
    run("tpm2_startup", "-c")
    run("tpm2_changepps")
    eventually(lambda: daemon.get(name).identity == pb.CHANGED)
    assert [key.role for key in daemon.get(name).keys] == [pb.EK]
    revoked = {kind for kind, item in before.items() if int(item.serial, 16) in revoked_serials(daemon)}
    assert revoked == {("AK", "ECC_P256")}


def test_a_failed_change_changes_nothing(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    instance = daemon.running(name)
    # Platform authorization is closed.
    assert tool(instance)("tpm2_changeeps", check=False).returncode
    time.sleep(0.2)
    assert daemon.get(name).identity == pb.CERTIFIED


PLATFORMS = ["Rack “A” — 東京", "x" * 256, "quotes \" ' \\ $(date)"]


@pytest.mark.parametrize("model", PLATFORMS)
def test_the_platform_is_as_the_creation_says(daemon: DaemonProcess, name: str, model: str) -> None:
    made = daemon.create(name, platform=pb.Platform(model=model, manufacturer="Maker"))
    assert (made.platform.manufacturer, made.platform.model, made.platform.version) == ("Maker", model, "1")
    assert model.encode() in certificates(daemon, name)["PLATFORM", ""].der


@pytest.mark.parametrize("model", ["nul \0", "line\nend", "x" * 257, "   "])
def test_a_platform_that_can_t_be_in_a_certificate_is_refused(daemon: DaemonProcess, name: str, model: str) -> None:
    with pytest.raises(VtpmError) as raised:
        daemon.create(name, platform=pb.Platform(model=model))
    assert raised.value.reason == "CERTIFICATE_TEXT_INVALID"


def test_without_a_ca_an_instance_is_uncertified() -> None:
    with DaemonProcess(environment={"VTPM_CA": "none"}) as daemon:
        assert daemon.running("web-1").identity == pb.UNCERTIFIED
