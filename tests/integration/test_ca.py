"""The certificate authority as operators use it: by the vtpm command, checked with openssl."""

from __future__ import annotations

import json
import subprocess
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.ports import free_pair
from tests.support.softhsm import MODULE, make_token
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.pki.model import CertificateKind

CA_EXTENSIONS = (
    "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n"
    "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
)


def sh(directory: Path, command: str, *, check: bool = True) -> str:
    done = subprocess.run(command.split(), cwd=directory, capture_output=True, check=False, timeout=60)
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0 or not check, f"{command}: {output}"
    return output


def authorities(daemon: DaemonProcess) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(daemon.vtpm("ca", "show", "-o", "json").stdout)
    return found


def operators_ca(directory: Path) -> None:
    """root.pem and root.key made by openssl."""
    sh(directory, "openssl ecparam -name secp384r1 -genkey -noout -out root.key")
    (directory / "root.cnf").write_text(
        "[req]\ndistinguished_name=dn\nx509_extensions=v3\nprompt=no\n[dn]\nCN=Operator root\n"
        "[v3]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n"
    )
    sh(directory, "openssl req -x509 -new -key root.key -sha384 -days 365 -config root.cnf -out root.pem")
    (directory / "ext").write_text(CA_EXTENSIONS)


def sign_request(directory: Path, request: str, out: str) -> None:
    sh(directory, f"openssl x509 -req -in {request} -CA root.pem -CAkey root.key -days 90 -sha384 -extfile ext -out {out}")


def certified(daemon: DaemonProcess, name: str) -> uuid.UUID:
    """Create an instance with five certificates: of three EKs, its AK and its platform."""
    profile = pb.Profile(ek_algorithms=[pb.RSA_2048, pb.ECC_P256, pb.ECC_P384])
    return uuid.UUID(daemon.create(name, profile=profile).id)


def test_certificates_are_printed_and_verified(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon = own_daemon
    instance = certified(daemon, "web-1")
    daemon.vtpm("ca", "show", "--out", str(tmp_path))
    verify = "openssl verify -CAfile root.pem -untrusted issuing.pem"
    for kind, more in (("ek-rsa", ""), ("ek-ecc", "--algorithm ecc_p384"), ("ak", "")):
        arguments = ["instance", "cert", "web-1", "--kind", kind, *more.split()]
        (tmp_path / f"{kind}.pem").write_bytes(daemon.vtpm(*arguments).stdout)
        assert sh(tmp_path, f"{verify} {kind}.pem") == f"{kind}.pem: OK\n"
        daemon.vtpm(*arguments, "--format", "der", "--out", str(tmp_path / f"{kind}.der"))
        sh(tmp_path, f"openssl x509 -inform DER -in {kind}.der -out again.pem")
        assert (tmp_path / "again.pem").read_bytes() == (tmp_path / f"{kind}.pem").read_bytes()
    text = daemon.vtpm("instance", "cert", "web-1", "--kind", "ak", "--format", "text").stdout.decode()
    assert f"spiffe://vtpm.internal/instance/{instance}" in text
    platform = daemon.vtpm("instance", "cert", "web-1", "--kind", "platform", "--format", "text").stdout.decode()
    serial = sh(tmp_path, "openssl x509 -in ek-rsa.pem -noout -serial").strip().removeprefix("serial=").lower()
    assert f"holder's serial:        {serial.lstrip('0')}" in platform
    assert f"platform serial:        {instance}" in platform
    ambiguous = daemon.vtpm("instance", "cert", "web-1", "--kind", "ek-ecc", check=False)
    assert ambiguous.stderr.startswith(b"vtpm: CERTIFICATE_AMBIGUOUS: web-1: ")


def test_revocation_reaches_the_crl(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon = own_daemon
    instance = certified(daemon, "web-1")
    daemon.vtpm("ca", "show", "--out", str(tmp_path))
    for kind in ("ek-rsa", "ak"):
        daemon.vtpm("instance", "cert", "web-1", "--kind", kind, "--out", str(tmp_path / f"{kind}.pem"))
    serial = sh(tmp_path, "openssl x509 -in ak.pem -noout -serial").strip().removeprefix("serial=")
    revoked = json.loads(daemon.vtpm("ca", "revoke", "--serial", serial, "--reason", "superseded", "-o", "json").stdout)
    assert [(one["kind"], one["revocation_reason"]) for one in revoked] == [(CertificateKind.AK, "superseded")]
    check = "openssl verify -crl_check -CRLfile crl.pem -CAfile root.pem -untrusted issuing.pem"
    daemon.vtpm("ca", "crl", "--out", str(tmp_path / "crl.pem"))
    assert "certificate revoked" in sh(tmp_path, f"{check} ak.pem", check=False)
    assert "ek-rsa.pem: OK" in sh(tmp_path, f"{check} ek-rsa.pem")
    daemon.vtpm("instance", "delete", "web-1", "--yes")
    daemon.vtpm("ca", "crl", "--out", str(tmp_path / "crl.pem"))
    assert "certificate revoked" in sh(tmp_path, f"{check} ek-rsa.pem", check=False)
    assert len(json.loads(daemon.vtpm("instance", "cert", str(instance), "--history", "-o", "json").stdout)) == 5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("instance cert nobody", "INSTANCE_NOT_FOUND"),
        ("ca revoke nobody", "INSTANCE_NOT_FOUND"),
        ("ca revoke", "REVOCATION_AMBIGUOUS"),
        ("ca revoke --serial zz", "SERIAL_INVALID"),
        ("ca revoke --serial 12ab", "CERTIFICATE_NOT_FOUND"),
        ("ca revoke web --serial 12ab", "REVOCATION_AMBIGUOUS"),
        ("ca crl --key-id 00", "CA_NOT_FOUND"),
        ("ca crl --key-id zz", "HEX_INVALID"),
        ("ca init", "CA_EXISTS"),
        ("ca import --cert /nonexistent", "FILE_UNREADABLE"),
        ("ca import --cert /etc/hostname", "CA_CERTIFICATE_UNREADABLE"),
        ("ca csr --pkcs11 nonsense", "PKCS11_URI_INVALID"),
        ("ca csr --pkcs11 pkcs11:token=a;object=b", "PKCS11_UNAVAILABLE"),
    ],
)
def test_errors_are_one_line_with_a_reason(daemon: DaemonProcess, arguments: str, reason: str) -> None:
    done = daemon.vtpm(*arguments.split(), check=False)
    assert done.returncode != 0
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"vtpm: {reason}: ")
    if "--cert" in arguments:
        assert arguments.split()[-1] in line


def test_rotation_with_live_instances(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon = own_daemon
    certified(daemon, "web-1")
    daemon.power_on("web-1")
    before = authorities(daemon)[0]
    daemon.vtpm("ca", "rotate")
    daemon.stop()
    daemon.start()
    now, old = authorities(daemon)
    assert (now["state"], old["state"], old["key_id"]) == ("CURRENT", "RETIRED", before["key_id"])
    assert now["chain"][-1] == before["chain"][-1]
    # What the old one issued is still verified by the old chain, and its CRL tells of it.
    daemon.vtpm("ca", "revoke", "web-1", "--reason", "keyCompromise")
    daemon.vtpm("ca", "crl", "--key-id", old["key_id"], "--out", str(tmp_path / "old.pem"))
    daemon.vtpm("ca", "crl", "--out", str(tmp_path / "now.pem"))
    assert sh(tmp_path, "openssl crl -in old.pem -noout -text").count("Key Compromise") == 5
    assert "No Revoked Certificates" in sh(tmp_path, "openssl crl -in now.pem -noout -text")
    # Nothing of this disturbs the TPM that runs, nor a key rotation.
    daemon.vtpm("pcrs", "web-1")
    daemon.vtpm("key", "rotate")
    daemon.stop()
    daemon.start()
    assert authorities(daemon)[0]["key_id"] == now["key_id"]


def test_a_request_is_signed_by_the_operators_root(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    operators_ca(tmp_path)
    own_daemon.vtpm("ca", "csr", "--name", "Site 7 vTPM", "--out", str(tmp_path / "csr.pem"))
    sign_request(tmp_path, "csr.pem", "issuing.pem")
    paths = ("--cert", str(tmp_path / "issuing.pem"), "--chain", str(tmp_path / "root.pem"))
    own_daemon.vtpm("ca", "import", *paths)
    assert authorities(own_daemon)[0]["subject"] == "CN=Site 7 vTPM"
    # The root's key is elsewhere, so a rotation goes the same way again.
    refused = own_daemon.vtpm("ca", "rotate", check=False)
    assert refused.stderr.startswith(b"vtpm: CA_ROOT_ELSEWHERE: ")


def test_an_operators_ca_in_files(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    operators_ca(tmp_path)
    sh(tmp_path, "openssl ecparam -name secp384r1 -genkey -noout -out plain.key")
    (tmp_path / "pass").write_text("open sesame\n")
    sh(tmp_path, "openssl pkcs8 -topk8 -in plain.key -out ca.key -passout file:pass")
    sh(tmp_path, "openssl req -new -key plain.key -subj /CN=Files -out csr.pem")
    sign_request(tmp_path, "csr.pem", "ca.pem")
    names = {
        option: str(tmp_path / name) for option, name in (("--cert", "ca.pem"), ("--key", "ca.key"), ("--chain", "root.pem"))
    }
    arguments = [part for pair in names.items() for part in pair]
    locked = own_daemon.vtpm("ca", "import", *arguments, check=False)
    assert locked.stderr.decode().startswith(f"vtpm: CA_KEY_ENCRYPTED: {names['--key']}: ")
    own_daemon.vtpm("ca", "import", *arguments, "--passphrase-file", str(tmp_path / "pass"))
    assert authorities(own_daemon)[0]["subject"] == "CN=Files"
    # Neither the key nor its passphrase is in a log, in the store, or left in a file.
    secret = sh(tmp_path, "openssl ec -in plain.key -noout -text").split("priv:")[1].split("pub:")[0]
    value = bytes.fromhex(secret.replace(":", "").replace("\n", "").replace(" ", ""))[-48:]
    for path in [own_daemon.log_path, *own_daemon.state_dir.iterdir()]:
        content = path.read_bytes() if path.is_file() else b""
        assert value not in content
        assert b"open sesame" not in content
    swapped = [*arguments[:3], str(tmp_path / "root.key"), *arguments[4:]]
    mismatch = own_daemon.vtpm("ca", "import", *swapped, check=False)
    assert mismatch.stderr.decode().startswith(f"vtpm: CA_KEY_MISMATCH: {tmp_path / 'root.key'}: ")


def test_a_key_in_a_token(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    token = make_token(tmp_path)
    uri = token.add_key("issuing", "01", ec.generate_private_key(ec.SECP384R1()))
    operators_ca(tmp_path)
    environment = token.environment | {"VTPM_CA_PKCS11_MODULE": MODULE, "VTPM_CA_PKCS11_PIN_FILE": str(token.pin_file)}
    with DaemonProcess(environment=environment) as daemon:
        daemon.vtpm("ca", "csr", "--pkcs11", uri, "--name", "Token", "--out", str(tmp_path / "csr.pem"))
        sign_request(tmp_path, "csr.pem", "ca.pem")
        daemon.vtpm("ca", "import", "--cert", str(tmp_path / "ca.pem"), "--chain", str(tmp_path / "root.pem"), "--pkcs11", uri)
        daemon.vtpm("ca", "crl", "--out", str(tmp_path / "crl.pem"))
        assert "verify OK" in sh(tmp_path, "openssl crl -in crl.pem -noout -CAfile ca.pem")
        daemon.stop()
        daemon.start()
        assert (authorities(daemon)[0]["signer"], authorities(daemon)[0]["subject"]) == ("PKCS11", "CN=Token")
        # Without the token the daemon does not start, and says why.
        daemon.stop()
        daemon.environment["VTPM_CA_PKCS11_PIN_FILE"] = str(tmp_path / "none")
        assert_refused(daemon, "PKCS11_PIN_UNREADABLE")


def assert_refused(daemon: DaemonProcess, reason: str) -> None:
    """The daemon ends at once, with this reason."""
    with pytest.raises(RuntimeError):
        daemon.start()
    assert reason in daemon.log_text()


def test_a_clock_behind_the_ca_is_refused_at_start(own_daemon: DaemonProcess) -> None:
    assert authorities(own_daemon)[0]["state"] == "CURRENT"
    own_daemon.stop()
    own_daemon.environment["LD_PRELOAD"] = faketime_library()
    own_daemon.environment["FAKETIME"] = "-2d"
    assert_refused(own_daemon, "CA_NOT_YET_VALID")
    assert "set this host's clock" in own_daemon.log_text()
    del own_daemon.environment["LD_PRELOAD"], own_daemon.environment["FAKETIME"]
    own_daemon.start()


def faketime_library() -> str:
    listed = subprocess.run(["dpkg", "-L", "libfaketime"], capture_output=True, check=True, text=True).stdout
    return next(path for path in listed.split() if path.endswith("libfaketimeMT.so.1"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_crash_while_the_ca_is_made_leaves_a_store_that_starts(count: int) -> None:
    daemon = DaemonProcess(environment={"VTPM_CRASH_POINT": f"authority.before_commit:{count}"})
    try:
        with pytest.raises(RuntimeError):
            daemon.start()
        daemon.environment.pop("VTPM_CRASH_POINT")
        daemon.start()
        assert [one["state"] for one in authorities(daemon)] == ["CURRENT"]
    finally:
        daemon.close()


@pytest.fixture
def published() -> Iterator[tuple[DaemonProcess, Callable[[str], bytes]]]:
    """Give a daemon with distribution points, and what gets a path of them."""
    port = free_pair()
    base = f"http://127.0.0.1:{port}"
    with DaemonProcess(environment={"VTPM_PKI_HTTP_ADDRESS": f"127.0.0.1:{port}", "VTPM_PKI_BASE_URL": base}) as daemon:

        def get(path: str) -> bytes:
            with urllib.request.urlopen(base + path, timeout=10) as answer:
                content: bytes = answer.read()
                return content

        yield daemon, get


def test_crl_and_chain_over_http(published: tuple[DaemonProcess, Callable[[str], bytes]], tmp_path: Path) -> None:
    daemon, get = published
    key_id = authorities(daemon)[0]["key_id"]
    (tmp_path / "crl.der").write_bytes(get(f"/crl/{key_id}.crl"))
    (tmp_path / "issuing.der").write_bytes(get(f"/ca/{key_id}.cer"))
    sh(tmp_path, "openssl x509 -inform DER -in issuing.der -out issuing.pem")
    assert "verify OK" in sh(tmp_path, "openssl crl -inform DER -in crl.der -noout -CAfile issuing.pem")


def test_without_a_ca(tmp_path: Path) -> None:
    with DaemonProcess(environment={"VTPM_CA": "none"}) as daemon:
        assert daemon.vtpm("ca", "show", check=False).stderr.startswith(b"vtpm: CA_DISABLED: ")
        daemon.running("web-1")
