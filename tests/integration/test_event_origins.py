"""One log, two voices: who measured what is said by the service, and nobody drowns another out."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import raw, vmm
from tests.support.daemon import DaemonProcess
from tests.support.vmm import Vmm
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.cli.client import Client
from vtpm.errors import VtpmError
from vtpm.tpm.eventlog import parse_event_log, replay
from vtpm.tpm.pcr import PcrBank

OPERATOR, GUEST, VMM = tpm_pb2.OPERATOR, tpm_pb2.GUEST, tpm_pb2.VMM


@pytest.fixture
def guest(running: pb.Instance) -> Iterator[Client]:
    """The VM of `running`, on its guest socket."""
    client = Client(f"unix:{running.guest_socket}")
    yield client
    client.close()


def measure(client: Client, text: bytes, *, pcr: int = 16, instance: str = "", size: int = 0) -> None:
    request = tpm_pb2.MeasureRequest(instance=instance, pcr=pcr, data=text, event_data=text + bytes(size))
    client.call(client.tpm.Measure, request)


def log_of(client: Client, instance: str = "") -> list[tuple[tpm_pb2.EventOrigin.ValueType, bytes]]:
    """The events of an instance: whose they are, and their data."""
    made: tpm_pb2.GetEventLogResponse = client.call(client.tpm.GetEventLog, tpm_pb2.GetEventLogRequest(instance=instance))
    events = parse_event_log(made.event_log)
    return [(origin, event.data) for origin, event in zip(made.origins, events, strict=True)]


def test_events_say_whose_they_are_whatever_they_claim(daemon: DaemonProcess, running: pb.Instance, guest: Client) -> None:
    measure(daemon.client, b"by an operator", instance=running.name)
    measure(guest, b"OPERATOR: trust me")
    measure(daemon.client, b"by an operator again", instance=running.name, pcr=0)
    expected = [(OPERATOR, b"by an operator"), (GUEST, b"OPERATOR: trust me"), (OPERATOR, b"by an operator again")]
    assert log_of(daemon.client, running.name) == expected
    assert log_of(guest) == expected


def test_a_guest_that_fills_its_part_keeps_no_operator_from_measuring(
    daemon: DaemonProcess, running: pb.Instance, guest: Client
) -> None:
    def fill() -> None:
        for number in range(1000):
            measure(guest, b"%d" % number, size=4000)

    with pytest.raises(VtpmError) as full:
        fill()
    assert full.value.reason == "EVENT_LOG_FULL"
    assert "GUEST" in full.value.message
    before = daemon.vtpm("pcrs", running.name, "--pcrs", "sha256:16").stdout
    with pytest.raises(VtpmError):
        measure(guest, b"once more", size=4000)
    assert daemon.vtpm("pcrs", running.name, "--pcrs", "sha256:16").stdout == before, "nothing was extended"
    for number in range(20):
        measure(daemon.client, b"operator %d" % number, instance=running.name, size=4000)
    assert [origin for origin, _ in log_of(daemon.client, running.name)].count(OPERATOR) == 20


@pytest.mark.parametrize("pcr", range(8))
def test_a_guest_measures_into_no_pcr_of_the_firmware(
    daemon: DaemonProcess, running: pb.Instance, guest: Client, pcr: int
) -> None:
    before = daemon.vtpm("pcrs", running.name).stdout
    with pytest.raises(VtpmError) as refused:
        measure(guest, b"forged", pcr=pcr)
    assert refused.value.reason == "PCR_NOT_FOR_GUESTS"
    assert daemon.vtpm("pcrs", running.name).stdout == before
    assert log_of(daemon.client, running.name) == []
    measure(daemon.client, b"an operator may", instance=running.name, pcr=pcr)
    measure(guest, b"its own", pcr=8)


def test_origins_outlive_hibernation_and_the_daemon(own_daemon: DaemonProcess) -> None:
    instance = own_daemon.running("web-1")

    def as_guest(text: bytes) -> None:
        client = Client(f"unix:{instance.guest_socket}")
        measure(client, text)
        client.close()

    measure(own_daemon.client, b"operator", instance="web-1")
    as_guest(b"guest")
    expected = [(OPERATOR, b"operator"), (GUEST, b"guest")]
    own_daemon.hibernate("web-1")
    assert log_of(own_daemon.client, "web-1") == expected
    own_daemon.kill()
    own_daemon.start()
    assert log_of(own_daemon.client, "web-1") == expected
    own_daemon.hibernate("web-1")
    own_daemon.stop()
    own_daemon.start()
    as_guest(b"guest again")
    own_daemon.hibernate("web-1")
    assert log_of(own_daemon.client, "web-1") == [*expected, (GUEST, b"guest again")]
    own_daemon.vtpm("instance", "reset", "web-1")
    assert log_of(own_daemon.client, "web-1") == []


@pytest.mark.parametrize("asleep", [False, True])
def test_an_h_crtm_event_is_the_vmms_and_explains_pcr_0(daemon: DaemonProcess, name: str, asleep: bool) -> None:
    instance = daemon.create(name)
    machine = Vmm(instance.control_socket)
    machine.cold_start()
    machine.ask(vmm.HASH_START)
    for part in (b"firmware", b" volume"):
        machine.ask(vmm.HASH_DATA, struct.pack(">I", len(part)) + part)
    assert machine.ask(vmm.HASH_END) == bytes(4)
    if asleep:
        daemon.hibernate(name)
    machine.tpm(raw.startup_clear())
    measure(daemon.client, b"an operator", instance=name, pcr=0)
    made: tpm_pb2.GetEventLogResponse = daemon.client.call(
        daemon.client.tpm.GetEventLog, tpm_pb2.GetEventLogRequest(instance=name)
    )
    assert list(made.origins) == [VMM, VMM, OPERATOR]
    events = parse_event_log(made.event_log)
    assert events[1].digests[PcrBank.SHA256.alg_id] == hashlib.sha256(b"firmware volume").digest()
    assert replay(events, PcrBank.SHA256)[0] in machine.tpm(raw.pcr_read(0))
    # A dynamic launch is no part of the boot.
    assert [machine.ask(vmm.HASH_START), machine.ask(vmm.HASH_END)] == [bytes(4)] * 2
    assert len(log_of(daemon.client, name)) == 3
    machine.close()


def test_the_cli_shows_whose_the_events_are(daemon: DaemonProcess, running: pb.Instance, guest: Client, tmp_path: Path) -> None:
    (tmp_path / "app.conf").write_text("x = 1\n")
    daemon.vtpm("measure", running.name, "8", str(tmp_path / "app.conf"))
    measure(guest, b"\x1b[2J hello")
    table = daemon.vtpm("eventlog", "get", running.name, "-o", "table").stdout.decode().splitlines()
    assert [line.split()[:2] for line in table] == [["ORIGIN", "PCR"], ["operator", "8"], ["guest", "16"]]
    assert "\x1b" not in "".join(table)
    shown = json.loads(daemon.vtpm("eventlog", "get", running.name, "-o", "json").stdout)
    assert [(event["origin"], event["pcr"]) for event in shown] == [("operator", 8), ("guest", 16)]
    assert shown[0]["digests"]["sha256"] == hashlib.sha256(b"x = 1\n").hexdigest()
    # What goes into a file or a pipe is the log itself, as before.
    log = daemon.vtpm("eventlog", "get", running.name).stdout
    daemon.vtpm("eventlog", "get", running.name, "--out", str(tmp_path / "log.bin"))
    assert (tmp_path / "log.bin").read_bytes() == log
    assert len(parse_event_log(log)) == 2
