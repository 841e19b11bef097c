"""vtpm-swtpm-setup in swtpm_setup's place: the same TPM, but for what is random."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_dropin import KEY, OURS, PERMALL, PLAIN, READY, VOLATILE, Running, running

BOTH = pytest.mark.parametrize("program", [OURS, PLAIN])
COMMANDS = {OURS: [sys.executable, "-m", "vtpm.cli.dropin_setup"], PLAIN: ["swtpm_setup"]}


def setup(program: str, state: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    state.mkdir(exist_ok=True)
    command = [*COMMANDS[program], "--tpm2", "--tpmstate", str(state), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not check or ran.returncode == 0, ran.stdout + ran.stderr
    return ran


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A configuration whose certificate authority is in a directory of the test; the tool notes how it is called."""
    root = tmp_path / "ca"
    root.mkdir()
    names = ("signingkey", "issuercert", "certserial")
    (root / "ca.conf").write_text(f"statedir = {root}\n" + "".join(f"{name} = {root}/{name}\n" for name in names))
    (root / "options").write_text("--platform-manufacturer Fedora\n--platform-version 2.1\n--platform-model QEMU\n")
    (root / "tool").write_text(f'#!/bin/sh\necho "$@" >> {root}/calls\nexec swtpm_localca "$@"\n')
    (root / "tool").chmod(0o755)
    (root / "setup.conf").write_text(
        f"create_certs_tool = {root}/tool\ncreate_certs_tool_config = {root}/ca.conf\n"
        f"create_certs_tool_options = {root}/options\nactive_pcr_banks = sha256\n"
    )
    return root


def keys_of(tpm: Running) -> dict[str, str]:
    """Every persistent key's public area, without what is random."""
    found = {}
    for handle in re.findall(r"0x[0-9A-Fa-f]+", tpm.tools("tpm2_getcap", "handles-persistent")):
        text = tpm.tools("tpm2_readpublic", "-c", handle)
        found[handle] = re.sub(r"(?m)^(name|qualified name|rsa|x|y): [0-9a-f]+$", r"\1: …", text)
    return found


def nv_of(tpm: Running) -> str:
    """Every NV index's public area; sizes of certificates vary with their numbers."""
    return re.sub(r"(name: )[0-9a-f]+|(size: )[0-9]+", r"\1\2…", tpm.tools("tpm2_nvreadpublic"))


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--createek",
        "--createek --create-spk",
        "--createek --create-spk --ecc --pcr-banks sha1,sha384",
        "--create-ek-cert --create-platform-cert --lock-nvram --vmid vm-1 --display",
        "--create-ek-cert --allow-signing --lock-nvram --pcr-banks -",
        "--createek --allow-signing --decryption --rsa-keysize 3072 --create-spk",
    ],
)
def test_the_same_tpm(arguments: str, authority: Path, tmp_path: Path) -> None:
    made, calls = {}, {}
    for program in (OURS, PLAIN):
        (authority / "calls").write_text("")
        state = tmp_path / program
        setup(program, state, "--config", str(authority / "setup.conf"), *arguments.split())
        text = (authority / "calls").read_text()
        calls[program] = re.sub(r"(--ek )\S+|(--dir )\S+|(x=)[0-9a-f]+|(y=)[0-9a-f]+", r"\1\2\3\4…", text)
        with running(PLAIN, state, *READY) as tpm:
            banks = tpm.tools("tpm2_getcap", "pcrs")
            orderly = tpm.tools("tpm2_getcap", "properties-variable")
            made[program] = [keys_of(tpm), nv_of(tpm), banks, orderly]
    assert made[OURS] == made[PLAIN]
    assert calls[OURS] == calls[PLAIN]


def test_the_certificate_is_that_of_the_key(authority: Path, tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    files = tmp_path / "files"
    files.mkdir()
    state = tmp_path / "state"
    setup(OURS, state, "--config", str(authority / "setup.conf"), "--create-ek-cert", "--write-ek-cert-files", str(files))
    with running(OURS, state, *READY) as tpm:
        for name, index, handle in (("rsa2048", "0x1c00002", "0x81010001"), ("secp384r1", "0x1c00016", "0x81010016")):
            der = (files / f"ek-{name}.crt").read_bytes()
            tpm.tools("tpm2_nvread", index, "-C", "o", "-o", "cert")
            assert (state / "cert").read_bytes() == der
            key = x509.load_der_x509_certificate(der).public_key()
            text = tpm.tools("tpm2_readpublic", "-c", handle)
            if isinstance(key, rsa.RSAPublicKey):
                assert f"rsa: {key.public_numbers().n:x}\n" in text
            else:
                assert isinstance(key, ec.EllipticCurvePublicKey)
                assert f"x: {key.public_numbers().x:096x}\n" in text


@BOTH
def test_what_is_there_is_kept_unless_asked(program: str, tmp_path: Path) -> None:
    setup(program, tmp_path)
    before = (tmp_path / PERMALL).read_bytes()
    assert setup(program, tmp_path, check=False).returncode == 1
    setup(program, tmp_path, "--not-overwrite")
    assert (tmp_path / PERMALL).read_bytes() == before
    (tmp_path / VOLATILE).write_bytes(b"of another TPM")
    setup(program, tmp_path, "--overwrite")
    assert (tmp_path / PERMALL).read_bytes() != before


@BOTH
def test_reconfigure_changes_the_banks_and_no_keys(program: str, tmp_path: Path) -> None:
    setup(OURS if program == PLAIN else PLAIN, tmp_path, "--createek")
    with running(PLAIN, tmp_path, *READY) as tpm:
        keys = tpm.tools("tpm2_readpublic", "-c", "0x81010001")
        tpm.shut_down()
    setup(program, tmp_path, "--reconfigure", "--pcr-banks", "sha1,sha512")
    with running(PLAIN, tmp_path, *READY) as tpm:
        assert tpm.tools("tpm2_readpublic", "-c", "0x81010001") == keys
        banks = tpm.tools("tpm2_getcap", "pcrs")
    assert "sha256: [ ]" in banks
    assert "sha512: [ 0," in banks


@pytest.mark.parametrize("source", ["--keyfile", "--pwdfile", "--keyfile-fd", "--pwdfile-fd"])
@BOTH
def test_encrypted_state(program: str, source: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(KEY if "key" in source else "a password")
    state = tmp_path / "state"
    state.mkdir()
    fd = os.open(secret, os.O_RDONLY)
    value = str(fd) if source.endswith("-fd") else str(secret)
    command = [*COMMANDS[program], "--tpm2", "--tpmstate", f"dir://{state}", "--createek", source, value]
    command += ["--cipher", "aes-128-cbc"]
    assert subprocess.run(command, pass_fds=[fd], capture_output=True, timeout=60).returncode == 0
    os.close(fd)
    option = f"{'file' if 'key' in source else 'pwdfile'}={secret},mode=aes-128-cbc"
    for reader in (OURS, PLAIN):
        with running(reader, state, *READY, "--key", option) as tpm:
            assert "0x81010001" in tpm.tools("tpm2_getcap", "handles-persistent")
            tpm.shut_down()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--tpmstate", "DIR"], "TPM 1.2"),
        (["--tpm2"], "--tpm-state"),
        (["--tpm2", "--tpmstate", "DIR/none"], "none"),
        (["--tpm2", "--tpmstate", "iscsi://DIR/x"], "backend"),
        (["--tpm2", "--tpmstate", "DIR", "--take-ownership"], "--take-ownership"),
        (["--tpm2", "--tpmstate", "DIR", "--create-config-files", "root"], "--create-config-files"),
        (["--tpm2", "--tpmstate", "DIR", "--rsa-keysize", "1024"], "1024"),
        (["--tpm2", "--tpmstate", "DIR", "--cipher", "rot13"], "rot13"),
        (["--tpm2", "--tpmstate", "DIR", "--pcr-banks", "sha77"], "PCR banks"),
        (["--tpm2", "--tpmstate", "DIR", "--config", "/nonexistent"], "/nonexistent"),
        (["--tpm2", "--tpmstate", "DIR", "--bogus"], "bogus"),
        (["--tpm2", "--tpmstate", "DIR", "--reconfigure", "--createek"], "Reconfiguration"),
        (["--tpm2", "--tpmstate", "DIR", "--runas", "nobody-here"], "nobody-here"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(arguments: list[str], word: str, tmp_path: Path) -> None:
    command = [*COMMANDS[OURS], *(argument.replace("DIR", str(tmp_path)) for argument in arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1
    assert word in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / PERMALL).exists()


def test_a_certificate_tool_that_fails_leaves_no_state(authority: Path, tmp_path: Path) -> None:
    (authority / "tool").write_text("#!/bin/sh\necho no certificates today >&2\nexit 3\n")
    ran = setup(OURS, tmp_path / "s", "--create-ek-cert", "--config", str(authority / "setup.conf"), check=False)
    assert ran.returncode == 1
    assert "no certificates today" in ran.stderr
    assert not (tmp_path / "s" / PERMALL).exists()


def test_capabilities() -> None:
    def tell(program: str) -> dict[str, list[str]]:
        command = [*COMMANDS[program], "--tpm2", "--print-capabilities"]
        found: dict[str, list[str]] = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=20).stdout)
        return found

    ours, plain = tell(OURS), tell(PLAIN)
    assert ours.keys() == plain.keys()
    assert set(ours["features"]) < set(plain["features"])


@pytest.mark.parametrize("place", ["none", "file"])
def test_a_directory_for_certificates_that_is_not_there_is_refused_before_the_work(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    state = tmp_path / "state"
    state.mkdir()
    command = [sys.executable, "-m", "vtpm.cli.dropin_setup", "--tpm2", "--tpmstate", str(state), "--create-ek-cert"]
    command += ["--write-ek-cert-files", str(tmp_path / place)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert f"Cannot write to directory {tmp_path / place}." in ran.stderr
    assert "Starting vTPM" not in ran.stdout + ran.stderr
    assert not list(state.iterdir())
