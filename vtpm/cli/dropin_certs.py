"""Certificates of a TPM that is set up, by the program that swtpm_setup's configuration names (usually swtpm_localca)."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import rsa

from vtpm import files
from vtpm.errors import FailedPreconditionError, InvalidArgumentError
from vtpm.tpm.keys import public_key

_MAX_FILE: Final = 1 << 20
_NAME: Final = "swtpm_setup.conf"
_VARIABLE: Final = re.compile(r"\$\{(\w+)\}")
_FILES: Final = {"ek": "ek.cert", "platform": "platform.cert"}


def find_config(given: str) -> Path:
    """Return the configuration file: the one given, the user's, or the system's."""
    if given:
        return Path(given)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / _NAME
    return home if home.exists() else Path("/etc") / _NAME


def read_config(path: Path) -> dict[str, str]:
    """Return its settings."""
    try:
        lines = files.read(path, _MAX_FILE, follow=True).decode(errors="replace").splitlines()
    except OSError as error:
        raise InvalidArgumentError(
            "FILE_UNREADABLE", f"Could not read the config file: {error.strerror}", subject=str(path), remedy="give --config"
        ) from None
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.lstrip().startswith("#"))
    expand = lambda match: os.environ.get(match[1], "")  # noqa: E731
    return {name.strip(): _VARIABLE.sub(expand, value.strip()) for name, value in pairs}


@dataclass(frozen=True, slots=True)
class Certifier:
    """Calls the program as swtpm_setup does. `information` is what the TPM tells of itself."""

    config: Mapping[str, str]
    information: Mapping[str, Any]
    vm: str
    log_file: str
    say: Callable[[str], None]

    def certify(self, kind: str, tpmt_public: bytes) -> bytes:
        """Return a certificate for an EK, `kind` "ek" or "platform", in DER."""
        tool = self.config.get("create_certs_tool", "")
        if not tool:
            raise FailedPreconditionError(
                "CERTIFICATE_TOOL_MISSING", "the config file has no create_certs_tool", remedy="name it, as swtpm_localca"
            )
        spec, attributes = self.information["TPMSpecification"], self.information["TPMAttributes"]
        with tempfile.TemporaryDirectory(prefix="swtpm_setup.certs.") as directory:
            command = [tool, "--type", kind, "--ek", _describe(tpmt_public), "--dir", directory]
            command += ["--logfile", self.log_file] if self.log_file else []
            command += ["--vmid", self.vm] if self.vm else []
            command += ["--tpm-spec-family", spec["family"], "--tpm-spec-level", str(spec["level"])]
            command += ["--tpm-spec-revision", str(spec["revision"]), "--tpm-manufacturer", attributes["manufacturer"]]
            command += ["--tpm-model", attributes["model"], "--tpm-version", attributes["version"], "--tpm2"]
            for option, setting in (("--configfile", "create_certs_tool_config"), ("--optsfile", "create_certs_tool_options")):
                command += [option, self.config[setting]] if setting in self.config else []
            self.say(f"  Invoking {' '.join(command)}")
            try:
                ran = subprocess.run(command, capture_output=True, text=True, check=False)
                for line in (ran.stdout + ran.stderr).splitlines():
                    self.say(f"{Path(tool).name}: {line}")
                if ran.returncode:
                    raise FailedPreconditionError(
                        "CERTIFICATE_TOOL_FAILED", f"{tool} ended with status {ran.returncode}", remedy="see what it said above"
                    )
                # The directory is this user's alone; the program may have left anything in it.
                return files.read(Path(directory) / _FILES[kind], _MAX_FILE)
            except OSError as error:
                raise FailedPreconditionError(
                    "CERTIFICATE_TOOL_FAILED", f"{tool}: {error.strerror}", remedy="see create_certs_tool in the config file"
                ) from None


def _describe(tpmt_public: bytes) -> str:
    key = public_key(tpmt_public)
    if isinstance(key, rsa.RSAPublicKey):
        return f"{key.public_numbers().n:x}"
    numbers, size = key.public_numbers(), 2 * ((key.key_size + 7) // 8)
    return f"x={numbers.x:0{size}x},y={numbers.y:0{size}x},id={key.curve.name}"
