"""`vtpm eventlog` and `vtpm pcr`, with logs in files: no daemon, and no gRPC."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.daemon import ROOT
from tests.support.eventlogs import (
    BANK,
    action,
    driver_config,
    file_path,
    image,
    log_of,
    pe_image,
    separator,
)
from vtpm.cli import exits
from vtpm.eventlog.predict import predict_uki
from vtpm.eventlog.reference import reference_of
from vtpm.eventlog.replay import replay
from vtpm.eventlog.tcg import read_tcg


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from vtpm.cli.main import main; main()", *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, check=False, timeout=60)


def answer(*arguments: str, stdin: bytes = b"") -> Any:
    done = run(*arguments, "-o", "json", stdin=stdin)
    assert done.returncode in {exits.OK, exits.DIFFERENT}, done.stderr.decode()
    return json.loads(done.stdout)


def booted(kernel: bytes = b"kernel 1") -> bytes:
    return log_of(
        driver_config("SecureBoot", b"\1"),
        separator(7),
        action("Calling EFI Application from Boot Option"),
        separator(4),
        image(file_path("\\EFI\\shimx64.efi"), kernel),
        action("Exit Boot Services Returned with Success", 5),
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A file with the log of a boot."""
    path = tmp_path / "log"
    path.write_bytes(booted())
    return path


def test_a_log_is_shown_in_words_and_nothing_of_it_is_called_proven(log: Path) -> None:
    done = run("eventlog", "show", str(log))
    assert done.returncode == exits.OK
    assert b"variable SecureBoot = 1" in done.stdout
    assert b"not" in done.stderr
    assert b"proven before its registers are quoted" in done.stderr


def test_events_pcrs_and_boot_are_values_for_programs(log: Path) -> None:
    events = answer("eventlog", "show", str(log), "--events", "--pcr", "4,7")["events"]
    assert {event["register"] for event in events} == {"PCR 4", "PCR 7"}
    pcrs = answer("eventlog", "show", str(log), "--pcrs")["registers"]["sha256"]
    assert pcrs == {f"PCR {index}": value.hex() for index, value in sorted(replay(read_tcg(booted()), BANK).values.items())}
    boot = answer("eventlog", "show", str(log), "--boot")
    assert (boot["secure_boot"]["enabled"], boot["loaders"], boot["exit_boot_services"]) == (True, ["shim"], True)


def test_a_log_is_read_from_standard_input() -> None:
    assert answer("eventlog", "show", "-", "--pcrs", stdin=booted()) == answer(
        "eventlog", "show", "-", "--pcrs", stdin=booted()
    )


def test_a_difference_is_named_and_is_the_exit_code(log: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(booted(b"kernel 2"))
    done = run("eventlog", "explain", str(log), "--against", str(tmp_path / "other"))
    assert done.returncode == exits.DIFFERENT
    assert b"the binary differs" in done.stdout
    assert b"this is all that differs" in done.stdout
    same = run("eventlog", "explain", str(log), "--against", str(log))
    assert (same.returncode, same.stdout) == (exits.OK, b"no difference\n")


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_log_is_compared_with_reference_values(log: Path, tmp_path: Path, form: str) -> None:
    reference = reference_of(read_tcg(booted(b"kernel 2")), BANK)
    text = yaml.safe_dump(reference) if form == "yaml" else json.dumps(reference)
    (tmp_path / "reference").write_text(text)
    (found,) = answer("eventlog", "explain", str(log), "--against", str(tmp_path / "reference"))
    assert [item["subject"] for item in found["differences"]] == ["binary"]
    (tmp_path / "reference").write_text(text.replace("pcrs", "pcr" + "s", 1).replace("sha256", "md5"))
    assert b"REFERENCE_INVALID" in run("eventlog", "explain", str(log), "--against", str(tmp_path / "reference")).stderr


def test_aliases_of_yaml_are_refused(log: Path, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_text("pcrs: &a {sha256: {}}\nevents: *a\n")
    assert b"REFERENCE_INVALID" in run("eventlog", "explain", str(log), "--against", str(tmp_path / "bomb")).stderr


def test_pcrs_are_predicted(tmp_path: Path) -> None:
    uki = pe_image({".linux": pe_image({".text": b"k"}), ".cmdline": b"quiet"})
    (tmp_path / "uki").write_bytes(uki)
    made = answer("pcr", "predict", "--uki", str(tmp_path / "uki"))
    assert made["values"] == {"11": predict_uki(uki, BANK).values[11].hex()}
    (tmp_path / "kernel").write_bytes(pe_image({".text": b"k"}))
    (tmp_path / "log").write_bytes(booted())
    done = run("pcr", "predict", "--kernel", str(tmp_path / "kernel"), "--cmdline", "quiet", "--base", str(tmp_path / "log"))
    assert done.returncode == exits.OK
    assert b"PCR 4" in done.stdout
    assert b"assumed: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "{log}", "--events", "--pcrs"], b"VIEW_INVALID"),
        (["show", "{log}", "--bank", "sha512"], b"PCR_BANK_UNKNOWN"),
        (["show", "{log}", "--pcr", "99"], b"PCR_"),
        (["show", "./nowhere"], b"FILE_UNREADABLE"),
        (["explain", "{log}", "--against", "{text}"], b"EVENT_LOG_INVALID"),
    ],
)
def test_what_can_not_be_done_is_one_line_with_a_reason(log: Path, tmp_path: Path, arguments: list[str], said: bytes) -> None:
    (tmp_path / "text").write_text("no log")
    words = [word.format(log=log, text=tmp_path / "text") for word in arguments]
    done = run("eventlog", *words)
    assert done.returncode == exits.USAGE
    assert said in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_file_that_is_no_log_is_shown_as_a_finding(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no log")
    done = run("eventlog", "show", str(tmp_path / "text"))
    assert done.returncode == exits.OK
    assert b"problem: FORMAT_UNKNOWN" in done.stderr


@pytest.mark.parametrize("arguments", [["eventlog", "show"], ["eventlog", "explain", "--against", "{log}"]])
def test_with_a_file_grpc_is_not_imported(log: Path, arguments: list[str]) -> None:
    words = [word.format(log=log) for word in arguments]
    script = (
        "import sys\nfrom vtpm.cli import main\n"
        f"sys.argv = ['vtpm', *{words!r}, {str(log)!r}]\n"
        "try:\n    main.main()\nexcept SystemExit:\n    pass\n"
        "sys.exit('grpc' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
