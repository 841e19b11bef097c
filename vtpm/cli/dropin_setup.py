"""`vtpm-swtpm-setup`: takes swtpm_setup's command line and makes the same TPM, without starting one to talk to."""

from __future__ import annotations

import getopt
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from vtpm import __version__, files
from vtpm.cli.dropin_fields import refused
from vtpm.cli.dropin_options import state_place
from vtpm.errors import VtpmError

if TYPE_CHECKING:
    from vtpm.cli.dropin_make import Setup

_SETUP_VERSION: Final = "0.7.1"
_FLAGS: Final = (
    "tpm2 createek allow-signing decryption ecc create-ek-cert create-platform-cert create-spk lock-nvram display overwrite "
    "not-overwrite reconfigure print-capabilities version help"
)
_VALUES: Final = (
    "runas tpm-state tpmstate tpm swtpm_ioctl config logfile keyfile keyfile-fd pwdfile pwdfile-fd cipher pcr-banks "
    "rsa-keysize write-ek-cert-files tcsd-system-ps-file vmid"
)
# Of TPM 1.2, or other programs' work.
_REFUSED: Final = "take-ownership owner-well-known srk-well-known ownerpass= srkpass= create-config-files create-config-files="
_FEATURES: Final = (
    "tpm-2.0",
    "cmdarg-keyfile-fd",
    "cmdarg-pwdfile-fd",
    "cmdarg-write-ek-cert-files",
    "cmdarg-reconfigure-pcr-banks",
    "tpm2-rsa-keysize-2048",
    "tpm2-rsa-keysize-3072",
)
_USAGE: Final = """\
Usage: swtpm_setup --tpm2 --tpmstate <dir>|dir://<dir>|file://<file> [options]

Makes a TPM 2.0 in the place of swtpm_setup (docs/dropin.md); the options are those of swtpm_setup(8):

--createek --create-ek-cert --create-platform-cert --create-spk --ecc --allow-signing --decryption --lock-nvram
--rsa-keysize 2048|3072   --pcr-banks <banks>|-   --vmid <id>   --config <file>   --write-ek-cert-files <dir>
--keyfile <file>  --keyfile-fd <fd>  --pwdfile <file>  --pwdfile-fd <fd>  --cipher aes-128-cbc|aes-256-cbc
--overwrite  --not-overwrite  --reconfigure  --logfile <file>  --runas <user>  --display  --print-capabilities
--version  -h|--help
"""
_KEY_SOURCES: Final = {"--keyfile": "file", "--keyfile-fd": "fd", "--pwdfile": "pwdfile", "--pwdfile-fd": "pwdfd"}
_NEEDS_EK: Final = ("--createek", "--create-ek-cert", "--create-platform-cert")


def main() -> NoReturn:
    """Run with the process's arguments; ends it with swtpm_setup's exit statuses."""
    try:
        status = run(sys.argv[1:])
    except (OSError, VtpmError) as error:
        sys.stderr.write(f"{error}\n")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(arguments: list[str]) -> int:
    """Run with these arguments; return the exit status.

    Raises:
        VtpmError: they were refused, or the TPM could not be made; what was there is left as it was.
    """
    given = _parse(arguments)
    if "--help" in given:
        sys.stdout.write(_USAGE)
    elif "--version" in given:
        sys.stdout.write(f"TPM emulator setup tool version {_SETUP_VERSION}, vtpm {__version__}\n")
    elif "--print-capabilities" in given:
        features = ", ".join(json.dumps(name) for name in _FEATURES)
        sys.stdout.write(f'{{ "type": "swtpm_setup", "features": [ {features} ], "version": "{_SETUP_VERSION}" }}\n')
    else:
        return _Job(given).run()
    return 0


def _parse(arguments: list[str]) -> dict[str, str]:
    names = [*_FLAGS.split(), *(f"{name}=" for name in _VALUES.split()), *_REFUSED.split()]
    try:
        pairs, rest = getopt.gnu_getopt(arguments, "h", names)
    except getopt.GetoptError as error:
        raise refused(error.msg) from None
    given = {{"-h": "--help", "--tpm-state": "--tpmstate"}.get(name, name): value for name, value in pairs}
    for name in _REFUSED.split():
        if f"--{name.rstrip('=')}" in given:
            raise refused(f"--{name.rstrip('=')} is not supported for a TPM 2")
    if rest:
        raise refused(f"unknown argument '{rest[0]}'")
    return given


class _Job:
    """One call: `given` are its options."""

    def __init__(self, given: dict[str, str]) -> None:
        self._given = given
        if "--tpm2" not in given:
            raise refused("a TPM 1.2 was asked for; only a TPM 2.0 can be made", "give --tpm2")
        if "--tpmstate" not in given:
            raise refused("--tpm-state must be provided")
        place = given["--tpmstate"]
        place, self._single_file = state_place(place) if "://" in place else (place, False)
        self._directory = Path(place).absolute()
        self._create_ek = any(name in given for name in _NEEDS_EK)
        if "--reconfigure" in given and (self._create_ek or "--create-spk" in given):
            raise refused("Reconfiguration is not supported with creation of EK or certificates")
        if given.get("--rsa-keysize", "2048") not in ("2048", "3072"):
            raise refused(f"Unsupported RSA key size {given['--rsa-keysize']}.", "give 2048 or 3072")
        if given.get("--cipher", "aes-128-cbc") not in ("aes-cbc", "aes-128-cbc", "aes-256-cbc"):
            raise refused(f"Unsupported cipher {given['--cipher']}.", "give aes-128-cbc or aes-256-cbc")
        if len(_KEY_SOURCES.keys() & given.keys()) > 1:
            raise refused("give only one of --keyfile, --keyfile-fd, --pwdfile and --pwdfile-fd")
        for name in ("--config", "--logfile", "--keyfile", "--pwdfile", "--write-ek-cert-files"):
            if name in given:
                given[name] = str(Path(given[name]).absolute())
        self._log_fd = 2

    def _say(self, text: str) -> None:
        os.write(self._log_fd, f"{text}\n".encode(errors="replace"))

    def run(self) -> int:
        given = self._given
        from vtpm.cli import dropin_certs, dropin_make
        from vtpm.cli.dropin_linear import StateFile
        from vtpm.cli.dropin_process import open_log, run_as
        from vtpm.cli.dropin_state import StateDirectory, read_key
        from vtpm.engine import sandbox
        from vtpm.wire.swtpm_state import load_ciphers

        if given.get("--runas"):
            # All modules are here before another user's rights may hide them.
            load_ciphers()
            run_as(given["--runas"])
        needed = self._directory.parent if self._single_file else self._directory
        if not needed.is_dir():
            raise refused(f"Cannot access directory {needed}. Make sure it exists and is a directory.")
        certificates = Path(given.get("--write-ek-cert-files", needed))
        if not certificates.is_dir() or not os.access(certificates, os.W_OK | os.X_OK):
            # Before a TPM is made whose certificates would have no place.
            raise refused(
                f"Cannot write to directory {certificates}.", "name one for --write-ek-cert-files that can be written"
            )
        if "--logfile" in given:
            self._log_fd = open_log(given["--logfile"])
        key = {_KEY_SOURCES[name]: value for name, value in given.items() if name in _KEY_SOURCES}
        if key:
            key["mode"] = given.get("--cipher", "aes-128-cbc")
        state = (StateFile if self._single_file else StateDirectory)(self._directory, key=read_key(key))
        sandbox.forbid_dumps()
        state.lock()
        reconfigure = "--reconfigure" in given
        if state.sizes() and not reconfigure and "--overwrite" not in given:
            if "--not-overwrite" in given:
                self._say("Not overwriting existing state file.")
                return 0
            raise refused("Found existing TPM state.", "give --overwrite or --not-overwrite")
        before = state.read() if reconfigure else None
        if reconfigure and before is None:
            raise refused("There is no TPM state to reconfigure.")
        self._say(f"Starting vTPM {'reconfiguration' if reconfigure else 'manufacturing'} @ {time.ctime()}")
        if "--tpm" in given:
            self._say("--tpm: no other program is started; the TPM runs in this process")
        config = dropin_certs.read_config(dropin_certs.find_config(given.get("--config", "")))
        setup = dropin_make.Setup(before)
        if "--create-spk" in given:
            handle = setup.make_spk(int(given.get("--rsa-keysize", "2048")), ecc="--ecc" in given)
            self._say(f"Successfully created storage primary key with handle 0x{handle:x}.")
        if self._create_ek:
            self._make_keys(setup, config)
        names = given.get("--pcr-banks") or config.get("active_pcr_banks") or "sha256"
        if names != "-":
            banks = setup.allocate([name.strip() for name in names.split(",")])
            self._say(f"Successfully activated PCR banks {','.join(banks)}.")
        state.write(setup.finish())
        # What another TPM left behind must never meet this one.
        state.drop_volatile()
        self._say("Successfully authored TPM state.")
        self._say(f"Ending vTPM manufacturing @ {time.ctime()}")
        return 0

    def _make_keys(self, setup: Setup, config: dict[str, str]) -> None:
        from vtpm.cli.dropin_certs import Certifier
        from vtpm.cli.dropin_make import CERTIFICATES, PLATFORM_CERTIFICATE, signing_template
        from vtpm.tpm.keys import KeyAlgorithm, ek_handle, ek_template

        given, lock = self._given, "--lock-nvram" in self._given
        certifier = Certifier(
            config, json.loads(setup.information()), given.get("--vmid", ""), given.get("--logfile", ""), self._say
        )
        certify = "--create-ek-cert" in given or "--create-platform-cert" in given
        rsa = KeyAlgorithm.RSA_3072 if given.get("--rsa-keysize") == "3072" else KeyAlgorithm.RSA_2048
        for algorithm, text, name in (
            (rsa, f"RSA {given.get('--rsa-keysize', '2048')}", f"rsa{given.get('--rsa-keysize', '2048')}"),
            (KeyAlgorithm.ECC_P384, "ECC", "secp384r1"),
        ):
            signs = "--allow-signing" in given
            template = signing_template(algorithm, decryption="--decryption" in given) if signs else ek_template(algorithm)
            public = setup.make_ek(algorithm, template)
            self._say(f"Successfully created {text} EK with handle 0x{ek_handle(algorithm):x}.")
            if signs:
                index = setup.write_template(algorithm, template, lock=lock)
                self._say(f"Successfully created NVRAM area 0x{index:x} for {text} EK template.")
            if not certify:
                continue
            certificate = certifier.certify("ek", public)
            platform = algorithm is rsa and "--create-platform-cert" in given
            platform_certificate = certifier.certify("platform", public) if platform else b""
            setup.write_nv(CERTIFICATES[algorithm], certificate, lock=lock)
            self._say(f"Successfully created NVRAM area 0x{CERTIFICATES[algorithm]:x} for {text} EK certificate.")
            if platform_certificate:
                setup.write_nv(PLATFORM_CERTIFICATE, platform_certificate, lock=lock)
                self._say(f"Successfully created NVRAM area 0x{PLATFORM_CERTIFICATE:x} for platform certificate.")
            if "--write-ek-cert-files" in given:
                _write_certificate(Path(given["--write-ek-cert-files"]) / f"ek-{name}.crt", certificate)


def _write_certificate(path: Path, certificate: bytes) -> None:
    try:
        files.replace(path, certificate, mode=0o666)
    except OSError as error:
        raise refused(f"Could not write {path}: {error.strerror}") from None


if __name__ == "__main__":
    main()
