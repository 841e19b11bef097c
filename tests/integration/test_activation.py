"""A guest has its own AK certified: tpm2-tools in the guest's place, the guest socket as its way to the service."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.integration.conftest import Tool
from tests.support.certs import certificates, chain
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import activation_pb2 as apb
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli.client import Client
from vtpm.errors import ErrorKind, VtpmError

Bind = Callable[[pb.Instance], Tool]
_EKS = {"RSA_2048": "rsa", "ECC_P256": "ecc"}


class Guest:
    """A VM with its TPM and its guest socket."""

    def __init__(self, instance: pb.Instance, run: Tool, directory: Path) -> None:
        self.instance, self.run, self.directory = instance, run, directory
        self.client = Client(f"unix:{instance.guest_socket}")
        self._numbers = itertools.count()

    def make_ak(self, ek: str = "ECC_P256", kind: str = "ecc", scheme: str = "ecdsa") -> bytes:
        """An AK under an EK that is made from its template; its TPM2B_PUBLIC."""
        self.run("tpm2_createek", "-c", "ek.ctx", "-G", _EKS[ek])
        algorithms = ("-G", kind, "-g", "sha256", "-s", scheme)
        self.run("tpm2_createak", "-C", "ek.ctx", "-c", "ak.ctx", *algorithms, "-u", "ak.pub", "-f", "tss")
        self.run("tpm2_flushcontext", "-t")
        return (self.directory / "ak.pub").read_bytes()

    def begin(self, ak: bytes, ek_algorithm: str = "ECC_P256") -> apb.BeginAkCertificateResponse:
        request = apb.BeginAkCertificateRequest(ak_public=ak, ek_algorithm=ek_algorithm)
        begun: apb.BeginAkCertificateResponse = self.client.call(self.client.activation.BeginAkCertificate, request)
        return begun

    def activate(self, begun: apb.BeginAkCertificateResponse, *, check: bool = True) -> bytes:
        """tpm2_activatecredential with what the service gave; the secret."""
        blob, encrypted = begun.credential_blob, begun.encrypted_secret
        content = struct.pack(">IIH", 0xBADCC0DE, 1, len(blob)) + blob + struct.pack(">H", len(encrypted)) + encrypted
        (self.directory / "blob").write_bytes(content)
        self.run("tpm2_startauthsession", "--policy-session", "-S", "session.ctx")
        self.run("tpm2_policysecret", "-S", "session.ctx", "-c", "e")
        keys = ("-c", "ak.ctx", "-C", "ek.ctx", "-P", "session:session.ctx")
        done = self.run("tpm2_activatecredential", *keys, "-i", "blob", "-o", "secret", check=check)
        self.run("tpm2_flushcontext", "session.ctx", check=False)
        self.run("tpm2_flushcontext", "-t")
        return (self.directory / "secret").read_bytes() if done.returncode == 0 else b""

    def complete(self, activation: str, secret: bytes) -> apb.CompleteAkCertificateResponse:
        request = apb.CompleteAkCertificateRequest(activation=activation, secret=secret)
        done: apb.CompleteAkCertificateResponse = self.client.call(self.client.activation.CompleteAkCertificate, request)
        return done


@pytest.fixture
def guest(daemon: DaemonProcess, name: str, tool: Bind, tmp_path: Path) -> Iterator[Guest]:
    instance = daemon.running(name, profile=pb.Profile(ek_algorithms=[pb.RSA_2048, pb.ECC_P256]))
    guest = Guest(instance, tool(instance), tmp_path)
    yield guest
    guest.client.close()


@pytest.mark.parametrize(("ek", "kind", "scheme"), [("ECC_P256", "ecc", "ecdsa"), ("RSA_2048", "rsa", "rsassa")])
def test_a_proven_key_is_certified(daemon: DaemonProcess, guest: Guest, ek: str, kind: str, scheme: str) -> None:
    ak = guest.make_ak(ek, kind, scheme)
    begun = guest.begin(ak, ek_algorithm=ek)
    assert begun.ek_algorithm == ek
    done = guest.complete(begun.activation, guest.activate(begun))
    certificate = x509.load_der_x509_certificate(done.certificate)
    certificate.verify_directly_issued_by(chain(daemon)[0])
    assert [x509.load_pem_x509_certificate(pem.encode()) for pem in done.chain] == chain(daemon)
    uris = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert any(guest.instance.id in uri for uri in uris.get_values_for_type(x509.UniformResourceIdentifier))
    recorded = certificates(daemon, guest.instance.name, history=True)
    assert recorded["GUEST_AK", "ECC_P256" if kind == "ecc" else "RSA_2048"].der == done.certificate
    # It is no certificate of the service's own AK.
    assert certificates(daemon, guest.instance.name)["AK", "ECC_P256"].der != done.certificate


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(VtpmError) as raised:
        call()
    return raised.value.reason


def test_an_answer_counts_once(guest: Guest) -> None:
    begun = guest.begin(guest.make_ak())
    secret = guest.activate(begun)
    guest.complete(begun.activation, secret)
    assert refused(lambda: guest.complete(begun.activation, secret)) == "ACTIVATION_UNKNOWN"


def test_a_wrong_secret_ends_the_proof(daemon: DaemonProcess, guest: Guest) -> None:
    begun = guest.begin(guest.make_ak())
    secret = guest.activate(begun)
    assert refused(lambda: guest.complete(begun.activation, bytes(32))) == "ACTIVATION_WRONG"
    assert refused(lambda: guest.complete(begun.activation, secret)) == "ACTIVATION_UNKNOWN"
    events = [json.loads(line) for line in daemon.log_text().splitlines() if "activation.refused" in line]
    mine = [event for event in events if event["instance"] == guest.instance.id]
    assert [event["reason"] for event in mine] == ["ACTIVATION_WRONG", "ACTIVATION_UNKNOWN"]
    assert secret.hex() not in daemon.log_text()


def test_a_credential_for_another_key_is_not_opened(guest: Guest) -> None:
    """The TPM itself refuses: the Name is part of the credential."""
    other = guest.make_ak()
    begun = guest.begin(other)
    guest.make_ak()
    assert guest.activate(begun, check=False) == b""


def test_another_instance_can_t_answer(daemon: DaemonProcess, guest: Guest, name: str) -> None:
    begun = guest.begin(guest.make_ak())
    secret = guest.activate(begun)
    other = daemon.running(f"{name}-other")
    stranger = Client(f"unix:{other.guest_socket}")
    request = apb.CompleteAkCertificateRequest(activation=begun.activation, secret=secret)
    assert refused(lambda: stranger.call(stranger.activation.CompleteAkCertificate, request)) == "ACTIVATION_UNKNOWN"
    named = apb.BeginAkCertificateRequest(instance=guest.instance.name, ak_public=b"\0" * 40)
    assert refused(lambda: stranger.call(stranger.activation.BeginAkCertificate, named)) == "INSTANCE_NOT_YOURS"
    stranger.close()
    # And used nothing up.
    guest.complete(begun.activation, secret)


def test_a_key_that_is_no_ak_is_refused(guest: Guest) -> None:
    guest.run("tpm2_createprimary", "-C", "o", "-c", "primary.ctx")
    guest.run("tpm2_create", "-C", "primary.ctx", "-G", "ecc", "-u", "key.pub", "-r", "key.priv")
    guest.run("tpm2_flushcontext", "-t")
    public = (guest.directory / "key.pub").read_bytes()
    assert refused(lambda: guest.begin(public)) == "AK_UNSUITABLE"
    ek = next(key.tpmt_public for key in guest.instance.keys if key.role == pb.EK)
    assert refused(lambda: guest.begin(ek)) == "AK_UNSUITABLE"
    assert refused(lambda: guest.begin(b"garbage")) == "PUBLIC_AREA_INVALID"
    assert refused(lambda: guest.begin(b"")) == "PUBLIC_AREA_INVALID"


def test_who_only_tries_is_held_back(daemon: DaemonProcess, guest: Guest, name: str) -> None:
    begun = guest.begin(guest.make_ak())
    reasons = {refused(lambda: guest.complete("guess", bytes(32))) for _ in range(20)}
    assert reasons == {"ACTIVATION_UNKNOWN", "ACTIVATIONS_LIMITED"}
    with pytest.raises(VtpmError) as raised:
        guest.begin(b"\0" * 40)
    assert raised.value.kind is ErrorKind.RESOURCE_EXHAUSTED
    # Others are not held back, nor is the right answer to what was begun.
    guest.complete(begun.activation, guest.activate(begun))
    other = daemon.running(f"{name}-other")
    neighbour = Client(f"unix:{other.guest_socket}")
    request = apb.BeginAkCertificateRequest(ak_public=(guest.directory / "ak.pub").read_bytes())
    assert neighbour.call(neighbour.activation.BeginAkCertificate, request).activation
    neighbour.close()


def test_a_late_answer_is_refused(tool: Bind, tmp_path: Path) -> None:
    with DaemonProcess(environment={"VTPM_ACTIVATION_TIMEOUT_S": "1"}) as daemon:
        instance = daemon.running("web-1", profile=pb.Profile(ek_algorithms=[pb.ECC_P256]))
        guest = Guest(instance, tool(instance), tmp_path)
        begun = guest.begin(guest.make_ak())
        secret = guest.activate(begun)
        time.sleep(max(0.0, begun.expire_time.seconds + 1.1 - time.time()))
        assert refused(lambda: guest.complete(begun.activation, secret)) == "ACTIVATION_EXPIRED"
        guest.client.close()


@pytest.mark.parametrize(("ek", "evicted"), [(pb.RSA_2048, False), (pb.ECC_P256, True), (pb.ECC_P384, False)])
def test_vtpm_ak_certify_does_it_all(
    daemon: DaemonProcess, name: str, tool: Bind, tmp_path: Path, ek: pb.KeyAlgorithm.ValueType, evicted: bool
) -> None:
    instance = daemon.running(name, profile=pb.Profile(ek_algorithms=[ek]))
    run = tool(instance)
    run("tpm2_createek", "-c", "ek.ctx", "-G", "ecc")
    kind = ("-G", "ecc", "-g", "sha256", "-s", "ecdsa")
    run("tpm2_createak", "-C", "ek.ctx", "-c", "ak.ctx", *kind, "-u", "ak.pem", "-f", "pem")
    run("tpm2_flushcontext", "-t")
    run("tpm2_evictcontrol", "-c", "ak.ctx", "0x81010099")
    run("tpm2_flushcontext", "-t")
    if evicted:
        run("tpm2_evictcontrol", "-c", "0x81010002")
        deadline = time.monotonic() + 10
        while daemon.get(name).keys[0].handle:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    out = tmp_path / "ak-chain.pem"
    where = ("--address", f"unix:{instance.guest_socket}")
    daemon.vtpm(*where, "ak", "certify", "0x81010099", "--tcti", f"swtpm:path={instance.tpm_socket}", "--out", str(out))
    certificate, issuing, root = x509.load_pem_x509_certificates(out.read_bytes())
    certificate.verify_directly_issued_by(issuing)
    issuing.verify_directly_issued_by(root)
    public = certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert public == (tmp_path / "ak.pem").read_bytes()
    for handles in ("handles-transient", "handles-loaded-session", "handles-saved-session"):
        assert run("tpm2_getcap", handles).stdout == b""
