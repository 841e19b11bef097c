"""The vtpm command as operators use it: forms of output, exit codes, errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.daemon import DaemonProcess
from vtpm.cli import exits


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["instance", "show", "nobody"], "INSTANCE_NOT_FOUND"),
        (["instance", "create", "Not A Name"], "INSTANCE_NAME_INVALID"),
        (["instance", "create"], "USAGE"),
        (["instance", "create", "x", "--ek", "des"], "PROFILE_INVALID"),
        (["instance", "create", "--count", "many"], "USAGE"),
        (["no-such-command"], "USAGE"),
        (["quote", "nobody", "--pcrs", "md5:1", "--nonce", "00", "--out", "q"], "PCR_BANK_UNKNOWN"),
        (["quote", "nobody", "--pcrs", "sha256:1", "--nonce", "xyz", "--out", "q"], "HEX_INVALID"),
    ],
)
def test_errors_are_one_line_with_a_reason(daemon: DaemonProcess, arguments: list[str], reason: str) -> None:
    done = daemon.vtpm(*arguments, check=False)
    assert done.returncode in (2, 3)
    assert done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"vtpm: {reason}: ")


def test_no_daemon_is_said_in_one_line_with_the_way_out(daemon: DaemonProcess) -> None:
    done = daemon.vtpm("--runtime-dir", "/nonexistent", "instance", "list", check=False)
    assert done.returncode == 6
    assert b"DAEMON_UNREACHABLE" in done.stderr
    assert b"./script/run" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_json_and_yaml_say_the_same(daemon: DaemonProcess, name: str) -> None:
    daemon.create(name, labels={"team": "web"})
    as_json = json.loads(daemon.vtpm("instance", "show", name, "-o", "json").stdout)
    assert yaml.safe_load(daemon.vtpm("instance", "show", name, "-o", "yaml").stdout) == as_json
    assert {"id", "name", "state", "tpm_socket"} <= set(as_json)
    assert as_json["tpm_socket"].endswith(f"/instances/{as_json['id']}/tpm.sock")
    listed = json.loads(daemon.vtpm("instance", "list", "--filter", f"name={name}", "-o", "json").stdout)
    assert listed == [as_json]


def test_tables_on_a_pipe_are_not_cut(daemon: DaemonProcess, name: str) -> None:
    long = f"{name}-{'x' * (60 - len(name))}"
    daemon.create(long, labels={"a-rather-long-label-key": "and-a-rather-long-value-for-it-too"})
    text = daemon.vtpm("instance", "list", "--filter", f"name={long}").stdout.decode()
    assert f"{long} " in text
    assert "and-a-rather-long-value-for-it-too" in text


def test_bulk_creation_reports_what_it_made(daemon: DaemonProcess, name: str) -> None:
    done = daemon.vtpm("instance", "create", "--count", "12", "--prefix", f"{name}-", "--ek", "p256")
    assert b"12" in done.stdout
    listed = json.loads(daemon.vtpm("instance", "list", "--filter", f"name:{name}-", "-o", "json").stdout)
    assert len(listed) == 12
    again = daemon.vtpm("instance", "create", "--count", "13", "--prefix", f"{name}-", "--ek", "p256", check=False)
    assert again.returncode == exits.PARTIAL
    assert b"created 1 of 13" in again.stdout


def test_labels_power_and_deletion(daemon: DaemonProcess, name: str) -> None:
    daemon.create(name)
    daemon.vtpm("instance", "label", name, "a=1", "b=2")
    daemon.vtpm("instance", "label", name, "a-")
    assert dict(daemon.get(name).labels) == {"b": "2"}
    daemon.vtpm("instance", "start", name)
    refused = daemon.vtpm("instance", "delete", name, "--yes", check=False)
    assert refused.returncode == 5
    daemon.vtpm("instance", "stop", name)
    daemon.vtpm("instance", "delete", name, "--yes")
    assert daemon.vtpm("instance", "show", name, check=False).returncode == 3


def test_completion_and_help_need_no_daemon(daemon: DaemonProcess) -> None:
    assert b"instance" in daemon.vtpm("--help").stdout
    assert b"Exit codes" in daemon.vtpm("--help").stdout
    # Told which shell it is: whoever runs the tests may have none above them.
    command = [str(Path(sys.executable).with_name("vtpm")), "--show-completion", "bash"]
    environment = daemon.env | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert b"_VTPM_COMPLETE" in subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60).stdout
    assert b"fine" in daemon.vtpm("config", "check").stderr
