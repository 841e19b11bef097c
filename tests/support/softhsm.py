"""A SoftHSM token in a directory, with keys in it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PIN = "4711-secret-pin"


@dataclass(frozen=True)
class Token:
    """`pin_file` holds the PIN; `environment` is what a process needs to find the token."""

    directory: Path
    pin_file: Path
    environment: dict[str, str]

    def add_key(self, label: str, identifier: str, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
        """Put a key pair into the token; its URI."""
        file = self.directory / f"{label}.pem"
        file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        command = ["softhsm2-util", "--import", str(file), "--token", "ca", "--label", label, "--id", identifier, "--pin", PIN]
        subprocess.run(command, env=os.environ | self.environment, check=True, capture_output=True, timeout=60)
        file.unlink()
        return f"pkcs11:token=ca;object={label}"


def make_token(directory: Path) -> Token:
    """Make an empty token called `ca`."""
    (directory / "tokens").mkdir()
    config = directory / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {directory / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n")
    pin_file = directory / "pin"
    pin_file.write_text(PIN + "\n")
    pin_file.chmod(0o600)
    environment = {"SOFTHSM2_CONF": str(config)}
    command = ["softhsm2-util", "--init-token", "--free", "--label", "ca", "--pin", PIN, "--so-pin", PIN]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, timeout=60)
    return Token(directory, pin_file, environment)
