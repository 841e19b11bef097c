"""Test suites of others, with a hibernation between every two commands: clients that know nothing of it notice nothing."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.interrupt import Interrupter, listen_in
from tests.support.suites import Suite, SuiteUnavailableError, tpm2_pytss


@pytest.fixture
def quiet_daemon() -> Iterator[DaemonProcess]:
    """A daemon that hibernates nothing by itself."""
    environment = {"VTPM_IDLE_TIMEOUT_S": "0", "VTPM_LOG_LEVEL": "warning"}
    # A path without a space, as suites of others do not quote.
    with DaemonProcess(root=Path(tempfile.mkdtemp(prefix="vtpm-suite-")), environment=environment) as daemon:
        yield daemon


@pytest.mark.timeout(600)
@pytest.mark.parametrize("files", [("test_fapi.py",), ("--ignore=test_fapi.py",)], ids=["FAPI", "all but FAPI"])
def test_the_tests_of_tpm2_pytss_pass(quiet_daemon: DaemonProcess, files: Sequence[str]) -> None:
    try:
        directory = tpm2_pytss()
    except SuiteUnavailableError as error:
        pytest.skip(str(error))
    suite = Suite(quiet_daemon)
    # These want a TPM without a platform certificate, and every instance has one.
    done = suite.run(directory, *files, "-k", "not empty_platform_certificates")
    assert done.returncode == 0, done.stdout.decode()[-4000:]
    assert suite.interruptions > 1000


def test_tpm2_tools_work(quiet_daemon: DaemonProcess, tmp_path: Path) -> None:
    instance = quiet_daemon.running("web-1")
    path, listeners = listen_in(quiet_daemon.root)
    env = quiet_daemon.env | {"TPM2TOOLS_TCTI": f"swtpm:path={path}"}
    script = Path(__file__).parent / "tpm2_tools.sh"
    with Interrupter(quiet_daemon, instance, listeners) as between:
        done = subprocess.run(
            ["bash", "-ex", str(script)], env=env, cwd=tmp_path, capture_output=True, check=False, timeout=110
        )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert between.count > 500


def test_tpm2_tools_seal_and_unseal(quiet_daemon: DaemonProcess, tmp_path: Path) -> None:
    instance = quiet_daemon.running("web-1")
    path, listeners = listen_in(quiet_daemon.root)
    script = """
        set -e
        tpm2_startup -c
        tpm2_createprimary -Q -C o -g sha256 -G ecc -c primary.ctx
        tpm2_flushcontext -t
        tpm2_pcrextend 16:sha256=1111111111111111111111111111111111111111111111111111111111111111
        tpm2_startauthsession -S session.dat
        tpm2_policypcr -Q -S session.dat -l sha256:16 -L policy.dat
        tpm2_flushcontext session.dat
        echo -n secret | tpm2_create -Q -C primary.ctx -L policy.dat -i - -u key.pub -r key.priv
        tpm2_flushcontext -t
        tpm2_load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx
        tpm2_flushcontext -t
        tpm2_startauthsession --policy-session -S session.dat
        tpm2_policypcr -Q -S session.dat -l sha256:16
        tpm2_unseal -p session:session.dat -c key.ctx
        tpm2_flushcontext session.dat
        tpm2_flushcontext -t
        tpm2_pcrextend 16:sha256=1111111111111111111111111111111111111111111111111111111111111111
        ! tpm2_unseal -p pcr:sha256:16 -c key.ctx 2>/dev/null
    """
    env = quiet_daemon.env | {"TPM2TOOLS_TCTI": f"swtpm:path={path}"}
    with Interrupter(quiet_daemon, instance, listeners) as between:
        done = subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, capture_output=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.endswith(b"secret")
    assert between.count > 50
