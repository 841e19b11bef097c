"""The README's tour, as a new user types it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.integration.conftest import Tool
from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb


def shown(daemon: DaemonProcess, name: str) -> dict[str, object]:
    value: dict[str, object] = json.loads(daemon.vtpm("instance", "show", name, "-o", "json").stdout)
    return value


def test_the_tour(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon = own_daemon
    daemon.vtpm("instance", "create", "web-1")
    assert shown(daemon, "web-1")["state"] == "OFF"
    daemon.vtpm("instance", "start", "web-1")
    web = shown(daemon, "web-1")
    assert web["name"] == "web-1"
    assert web["state"] == "ON"
    assert " " in str(web["tpm_socket"]), "the tour works in directories with spaces"
    tcti = {**daemon.env, "TPM2TOOLS_TCTI": f"swtpm:path={web['tpm_socket']}"}
    random = subprocess.run(["tpm2_getrandom", "--hex", "16"], env=tcti, check=True, capture_output=True).stdout
    assert len(bytes.fromhex(random.decode())) == 16

    out = tmp_path / "a b"
    daemon.vtpm("quote", "web-1", "--pcrs", "sha256:0-7", "--nonce", "1234abcd", "--out", str(out))
    check = ["tpm2_checkquote", "-u", "ak.pem", "-m", "quote.msg", "-s", "quote.sig", "-f", "pcrs.bin", "-g", "sha256"]
    subprocess.run([*check, "-q", "1234abcd"], cwd=out, check=True, capture_output=True)
    assert subprocess.run([*check, "-q", "1234abce"], cwd=out, check=False, capture_output=True).returncode

    (tmp_path / "measured").write_bytes(b"boot loader")
    daemon.vtpm("measure", "web-1", "16", str(tmp_path / "measured"))
    daemon.vtpm("eventlog", "get", "web-1", "--out", str(tmp_path / "log.bin"))
    log = subprocess.run(["tpm2_eventlog", str(tmp_path / "log.bin")], check=True, capture_output=True).stdout.decode()
    replayed = next(line.split(":")[1].strip() for line in log.splitlines() if line.strip().startswith("16 :"))
    pcr = json.loads(daemon.vtpm("pcrs", "web-1", "--pcrs", "sha256:16", "-o", "json").stdout)
    assert replayed.removeprefix("0x") in json.dumps(pcr), "the event log replays to the PCR"
    for place in ("web-1", str(tmp_path / "log.bin")):
        shown_log = json.loads(daemon.vtpm("eventlog", "show", place, "--pcrs", "--pcr", "16", "-o", "json").stdout)
        assert shown_log["registers"]["sha256"]["PCR 16"] == replayed.removeprefix("0x")
    assert daemon.vtpm("eventlog", "explain", "web-1", "--against", str(tmp_path / "log.bin")).stdout == b"no difference\n"


def test_everything_is_there_after_the_daemon_was_stopped_and_started(
    own_daemon: DaemonProcess, tool: Callable[[pb.Instance], Tool], tmp_path: Path
) -> None:
    daemon = own_daemon
    web = daemon.running("web-1", profile=pb.Profile())
    run = tool(web)
    run("tpm2_nvdefine", "0x01500001", "-s", "8", "-a", "ownerread|ownerwrite")
    (tmp_path / "value").write_bytes(b"8 octets")
    run("tpm2_nvwrite", "0x01500001", "-C", "o", "-i", "value")
    run("tpm2_createprimary", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
    run("tpm2_evictcontrol", "-C", "o", "-c", "primary.ctx", "0x81000001")
    before = run("tpm2_readpublic", "-c", "0x81000001").stdout
    ek = run("tpm2_readpublic", "-c", "0x81010001").stdout
    daemon.vtpm("instance", "stop", "web-1")
    assert daemon.stop() == 0
    daemon.start()
    assert daemon.get("web-1").state == pb.OFF
    daemon.power_on("web-1")
    assert run("tpm2_nvread", "0x01500001", "-C", "o").stdout == b"8 octets"
    assert run("tpm2_readpublic", "-c", "0x81000001").stdout == before
    assert run("tpm2_readpublic", "-c", "0x81010001").stdout == ek
    assert list(daemon.get("web-1").keys) == list(web.keys)


def test_a_daemon_that_is_stopped_leaves_running_tpms_running(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    web = daemon.running("web-1")
    sock = raw.connect(web.tpm_socket)
    raw.succeed(sock, raw.pcr_extend(16, b"\x11" * 32))
    extended = raw.succeed(sock, raw.pcr_read(16))
    daemon.stop()
    assert raw.succeed(sock, raw.pcr_read(16)) == extended
    daemon.start()
    assert daemon.get("web-1").state == pb.ON
    assert raw.succeed(sock, raw.pcr_read(16)) == extended
    again = raw.connect(web.tpm_socket)
    assert raw.succeed(again, raw.pcr_read(16)) == extended


def test_power_off_drops_volatile_state(daemon: DaemonProcess, running: pb.Instance) -> None:
    fresh = raw.succeed(raw.connect(running.tpm_socket), raw.pcr_read(16))
    raw.succeed(raw.connect(running.tpm_socket), raw.pcr_extend(16, b"\x11" * 32))
    assert raw.succeed(raw.connect(running.tpm_socket), raw.pcr_read(16)) != fresh
    daemon.vtpm("instance", "stop", running.name)
    daemon.vtpm("instance", "start", running.name)
    # The update counter differs; the digests behind it are as after a power on.
    assert raw.succeed(raw.connect(running.tpm_socket), raw.pcr_read(16))[14:] == fresh[14:]
