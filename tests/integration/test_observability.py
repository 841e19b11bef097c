"""Logs and metrics: what operators watch, and what must never be in them."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from pathlib import Path

from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_metrics_count_instances_commands_commits_and_workers() -> None:
    address = f"127.0.0.1:{free_port()}"
    with DaemonProcess(environment={"VTPM_METRICS_ADDRESS": address}) as daemon:
        sock = raw.connect(daemon.running("web-1").tpm_socket)
        raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
        for _ in range(40):
            raw.succeed(sock, raw.pcr_read(0))
        raw.ask(sock, b"\x80\x01\0\0\0\x0a\x7f\xff\xff\xff")
        deadline = time.monotonic() + 30
        while True:
            text = urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode()
            values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            if values.get('vtpm_tpm_commands_total{ordinal="TPM2_PCR_Read"}') == "40.0" or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        assert values['vtpm_tpm_commands_total{ordinal="TPM2_PCR_Read"}'] == "40.0"
        assert values['vtpm_tpm_commands_total{ordinal="unknown"}'] == "1.0"
        assert float(values['vtpm_tpm_command_seconds_count{ordinal="TPM2_PCR_Read"}']) >= 2
        assert values['vtpm_instances{state="ON"}'] == "1.0"
        assert values["vtpm_workers"] == "1.0"
        assert float(values['vtpm_commits_total{result="durable"}']) >= 1
        assert float(values["vtpm_commit_seconds_count"]) >= 1
        assert values["vtpm_thaw_seconds_count"] == "0.0"
        assert values["vtpm_hibernated"] == "0.0"
        assert any(key.startswith("vtpm_grpc_requests_total") and "CreateInstance" in key for key in values)


def test_the_log_is_json_and_says_who_did_what_to_which_instance(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    daemon.running("web-1")
    daemon.vtpm("instance", "show", "nobody", check=False)
    daemon.stop()
    events = [json.loads(line) for line in daemon.log_text().splitlines()]
    names = [event["event"] for event in events]
    for expected in ("daemon.ready", "instance.created", "instance.started", "api.call", "daemon.draining", "daemon.stopped"):
        assert expected in names
    calls = [event for event in events if event["event"] == "api.call"]
    assert any(call["method"].endswith("/CreateInstance") and call["instance"] == "web-1" for call in calls)
    assert any(call["code"] == "NOT_FOUND" and call["reason"] == "INSTANCE_NOT_FOUND" for call in calls)


def test_no_nonce_command_or_measured_byte_is_in_a_log(tmp_path: Path) -> None:
    with DaemonProcess(environment={"VTPM_LOG_LEVEL": "debug"}) as daemon:
        web = daemon.running("web-1")
        secret = b"not for any log: 0123456789"
        (tmp_path / "data").write_bytes(secret)
        daemon.vtpm("measure", "web-1", "16", str(tmp_path / "data"))
        daemon.vtpm("quote", "web-1", "--pcrs", "sha256:0", "--nonce", secret.hex(), "--out", str(tmp_path / "q"))
        raw.succeed(raw.connect(web.tpm_socket), raw.nv_define(raw.ORDINARY, counter=False, size=len(secret)))
        daemon.vtpm("execute", "web-1", raw.nv_write(secret).hex())
        daemon.stop()
        log = daemon.log_text() + (daemon.runtime_dir / "engine-host.log").read_text()
    assert "api.call" in log
    assert secret.decode() not in log
    assert secret.hex() not in log.lower()


def test_tracing_needs_its_extra_and_takes_an_endpoint_that_is_away() -> None:
    with DaemonProcess(environment={"VTPM_OTEL_ENDPOINT": f"http://127.0.0.1:{free_port()}"}) as daemon:
        daemon.running("web-1")
        assert daemon.get("web-1").state == pb.ON
        assert daemon.stop() == 0
