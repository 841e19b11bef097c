"""Logs of what runs after the firmware: IMA, the Canonical Event Log, and systemd's."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.eventlogs import BANK, names, read, record, sha256
from tests.unit.eventlog.test_reading import use_everything
from vtpm.eventlog import ima
from vtpm.eventlog.checks import is_proven
from vtpm.eventlog.describe import describe
from vtpm.eventlog.hashes import SHA1, SHA256
from vtpm.eventlog.ima import (
    TEMPLATES,
    UnverifiedImaLog,
    check_ima,
    read_ima_ascii,
    read_ima_binary,
    replay_ima,
)
from vtpm.eventlog.reading import detect, read_log
from vtpm.eventlog.replay import replay
from vtpm.eventlog.types import EventType
from vtpm.eventlog.values import CEL_CONTENT, IMA_TEMPLATE, LogFormat, UnverifiedLog

DIGEST = b"sha256:\0" + sha256(b"file")


def field(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def sha1(data: bytes) -> bytes:
    return hashlib.sha1(data).digest()


def entry(*fields: bytes, template: str = "ima-ng", pcr: int = 10, template_hash: bytes | None = None) -> bytes:
    data = b"".join(map(field, fields))
    made = sha1(data) if template_hash is None else template_hash
    return struct.pack("<I", pcr) + made + field(template.encode()) + field(data)


def old_entry(path: bytes) -> bytes:
    digest = sha1(b"file")
    hashed = sha1(digest + path.ljust(256, b"\0"))
    return struct.pack("<I", 10) + hashed + field(b"ima") + digest + field(path)


NG = entry(DIGEST, b"/usr/bin/true\0")
VIOLATION = entry(b"sha256:\0" + bytes(32), b"/var/log/open\0", template_hash=bytes(20))
FIELDS = {
    "d-ng": DIGEST,
    "d-ngv2": b"verity:" + DIGEST,
    "n-ng": b"/bin/a b\0",
    "sig": b"\x03\x02sig",
    "buf": b"a=b",
    "d-modsig": DIGEST,
    "modsig": b"\x30pkcs7",
}


# ---- IMA --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in {"ima", "evm-sig"}])
def test_every_template_is_read_in_binary_and_in_ascii(template: str) -> None:
    fields = {name: FIELDS[name] for name in TEMPLATES[template]}
    (binary,) = read_ima_binary(entry(*fields.values(), template=template)).entries
    assert binary.fields == fields
    assert (binary.path, binary.file_digest[1]) == ("/bin/a b", sha256(b"file"))
    text = [
        value.replace(b":\0", b":" + value.partition(b":\0")[2].hex().encode())[: value.index(b":\0") + 65].decode()
        if name.startswith("d-")
        else value.rstrip(b"\0").decode()
        if name == "n-ng"
        else value.hex()
        for name, value in fields.items()
    ]
    ascii_log = read_ima_ascii(f" 10 {binary.template_hash.hex()} {template} {' '.join(text)}\n".encode())
    assert tuple(ascii_log.entries) == (binary,)
    assert not check_ima(ascii_log)


def test_the_oldest_template_is_read_and_its_hash_recomputes() -> None:
    log = read_ima_binary(old_entry(b"/init"))
    assert [(item.path, item.file_digest) for item in log.entries] == [("/init", ("sha1", sha1(b"file")))]
    assert not check_ima(log)


def test_a_template_named_by_its_format_is_read_and_another_is_a_finding() -> None:
    log = read_ima_binary(entry(DIGEST, b"/x\0", template="d-ng|n-ng") + entry(b"what", template="own"))
    first, second = log.entries
    assert first.path == "/x"
    assert second.fields == {"field 0": b"what"}
    assert names(log.findings) == {"IMA_TEMPLATE_UNKNOWN"}
    assert not check_ima(log)


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha384", "sha512"])
def test_binary_lists_of_any_template_hash_are_recognised(hash_name: str) -> None:
    data = field(DIGEST) + field(b"/x\0")
    raw = struct.pack("<I", 10) + hashlib.new(hash_name, data).digest() + field(b"ima-ng") + field(data)
    log = read_log(raw * 3)
    assert isinstance(log, UnverifiedImaLog)
    assert (log.format, len(log.entries)) == (LogFormat.IMA, 3)
    assert not check_ima(log)


def test_a_list_replays_with_violations_as_ones_and_each_bank_with_its_own_hash() -> None:
    log = read_ima_binary(NG + VIOLATION)
    data = next(iter(log.entries)).data
    assert replay_ima(log, SHA1) == {10: sha1(sha1(bytes(20) + sha1(data)) + b"\xff" * 20)}
    assert replay_ima(log, SHA256) == {10: sha256(sha256(bytes(32) + sha256(data)) + b"\xff" * 32)}
    padded = sha256(sha256(bytes(32) + sha1(data) + bytes(12)) + b"\xff" * 32)
    assert replay_ima(log, SHA256, padded=True) == {10: padded}
    assert replay_ima(log, SHA256, start=b"\1" * 32) != replay_ima(log, SHA256)
    assert names(check_ima(log)) == {"IMA_VIOLATION"}


def test_fields_that_are_not_what_was_hashed_are_a_finding() -> None:
    assert names(check_ima(read_ima_binary(NG[:-2] + b"X\0"))) == {"IMA_HASH_WRONG"}


def test_of_a_list_that_is_cut_anywhere_the_whole_entries_are_read() -> None:
    whole = NG + old_entry(b"/init") + NG
    for cut in range(len(whole)):
        log = read_ima_binary(whole[:cut])
        assert len(log.entries) == (cut >= len(NG)) + (cut >= len(whole) - len(NG))
        assert bool(log.findings) == (cut not in {0, len(NG), len(whole) - len(NG)})


@pytest.mark.parametrize(
    "raw",
    [
        NG[:24] + struct.pack("<I", 0) + NG[28:],
        NG[:24] + struct.pack("<I", 256) + NG[28:] + bytes(400),
        NG[:24] + struct.pack("<I", 0xFFFFFFFF) + NG[28:],
        NG[:34] + struct.pack("<I", 0xFFFFFFFF) + NG[38:],
        NG[:34] + struct.pack("<I", ima.MAX_FIELD_SIZE + 1) + bytes(ima.MAX_FIELD_SIZE + 1),
    ],
)
def test_sizes_of_an_entry_that_lie_end_the_reading(raw: bytes) -> None:
    log = read_ima_binary(NG + raw)
    assert len(log.entries) == 1
    assert len(log.findings) == 1


def test_more_entries_than_are_read_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ima, "MAX_ENTRIES", 3)
    assert names(read_ima_binary(NG * 5).findings) == {"TOO_MANY_EVENTS"}
    line = f"10 {sha1(b'x').hex()} ima-ng sha1:{sha1(b'y').hex()} /x\n".encode()
    log = read_ima_ascii(line * 5)
    assert (len(log.entries), names(log.findings)) == (3, {"TOO_MANY_EVENTS"})
    monkeypatch.setattr(ima, "MAX_LOG_SIZE", len(NG))
    assert names(read_ima_binary(NG * 2).findings) == {"LOG_TOO_LARGE"}


def test_the_entries_of_a_long_list_are_read_without_being_kept() -> None:
    raw = NG * 50_000
    tracemalloc.start()
    log = read_ima_binary(raw)
    values = replay_ima(log, SHA1)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(log.entries), len(values)) == (50_000, 1)
    assert most < 1 << 20


@pytest.mark.parametrize(
    "line",
    [
        "10 00 ima-ng sha1:00 /x",
        "10 " + "0" * 41 + " ima-ng sha1:00 /x",
        "10 " + "0" * 42 + " ima-ng sha1:00 /x",
        "10 " + "0" * 40 + " ima-ng sha1:zz /x",
        "10 " + "0" * 40 + " ima-ng",
        "10 " + "0" * 40 + " ima-sig sha1:00 /x",
        "10 " + "0" * 40 + " ima-what sha1:00 /x",
        "x",
    ],
)
def test_a_line_that_is_no_entry_is_left_out_with_a_finding(line: str) -> None:
    good = f"10 {sha1(b'x').hex()} ima-ng sha1:{sha1(b'y').hex()} /x"
    log = read_ima_ascii(f"{good}\n{line}\n\n{good}".encode())
    assert len(log.entries) == 2
    assert names(log.findings) == {"RECORD_INVALID"}


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=300))
def test_any_bytes_behind_an_entry_are_read_without_an_exception(data: bytes) -> None:
    for start in (
        NG,
        b"10 " + b"0" * 40 + b" ima-ng sha1:00 /x\n",
        b"\x1e",
        b"[",
        b"{",
        b"\0\0\0\0\x08" + bytes(8) + b"\1\0\0\0\1",
    ):
        use_everything(start + data)


# ---- CEL --------------------------------------------------------------------------------------------------------------------


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack(">BI", kind, len(value)) + value


def cel(number: int, content: bytes, register: bytes = tlv(1, b"\x07"), measured: bytes = b"m") -> bytes:
    return tlv(0, number.to_bytes(8)) + register + tlv(3, tlv(BANK, sha256(measured))) + content


PC_CLIENT = tlv(5, tlv(0, struct.pack(">I", EventType.EV_SEPARATOR)) + tlv(1, bytes(4)))


def test_a_canonical_log_in_tlv_is_read() -> None:
    raw = (
        cel(0, PC_CLIENT, measured=bytes(4))
        + cel(1, tlv(7, tlv(0, b"ima-ng") + tlv(1, b"template data")), tlv(1, b"\x0a"))
        + cel(2, tlv(80, tlv(1, b"sha256:abc")), tlv(108, b"\4"), tlv(80, tlv(1, b"sha256:abc")))
        + cel(3, tlv(99, b"?"), tlv(2, b"\1\2\3\4"))
    )
    log = read_log(raw)
    assert isinstance(log, UnverifiedLog)
    assert log.format is LogFormat.CEL_TLV
    assert [(event.register, event.event_type) for event in log.events] == [
        (7, EventType.EV_SEPARATOR),
        (10, IMA_TEMPLATE),
        (4, CEL_CONTENT),
        (-1, CEL_CONTENT),
    ]
    assert [describe(event) for event in log.events[2:]] == ["image digest: sha256:abc", "content of type 99: 1 bytes"]
    assert [is_proven(event, BANK) for event in log.events] == [True, False, True, False]
    assert names(log.findings) == {"NOT_A_PCR"}
    assert 7 not in replay(log, BANK).values, "registers of a trust domain end at 4"


def test_of_a_canonical_log_that_is_cut_anywhere_the_whole_records_are_read() -> None:
    one = cel(0, PC_CLIENT)
    raw = one + cel(1, PC_CLIENT)
    for cut in range(30, len(raw)):
        log = read_log(raw[:cut])
        assert isinstance(log, UnverifiedLog)
        assert len(log.events) == (cut >= len(one))
        assert bool(log.findings) == (cut != len(one))


@pytest.mark.parametrize(
    ("raw", "finding"),
    [
        (cel(0, PC_CLIENT) + cel(5, PC_CLIENT), "CEL_NUMBER_GAP"),
        (cel(0, PC_CLIENT) + cel(1, PC_CLIENT, tlv(77, b"\1")), "RECORD_INVALID"),
        (tlv(0, bytes(8)) + tlv(1, b"\1") + tlv(3, tlv(BANK, b"short")) + PC_CLIENT, "RECORD_INVALID"),
        (tlv(0, bytes(8)) + tlv(1, b"\1") + tlv(3, b"\x0b\xff\xff\xff\xff") + PC_CLIENT, "RECORD_INVALID"),
    ],
)
def test_a_record_that_cannot_be_right_is_a_finding(raw: bytes, finding: str) -> None:
    assert finding in names(read_log(raw).findings)


def json_record(number: int, **more: Any) -> dict[str, Any]:
    digests = [{"hashAlg": "sha256", "digest": sha256(b"m").hex()}]
    return {"recnum": number, "pcr": 7, "digests": digests, **more}


@pytest.mark.parametrize("as_array", [True, False])
def test_a_canonical_log_in_json_is_read(as_array: bool) -> None:
    records = [
        json_record(0, content_type="pcclient_std", content={"event_type": "EV_SEPARATOR", "event_data": "00000000"}),
        json_record(1, content_type="pcclient_std", content={"event_type": 6, "event_data": "AAECAw=="}),
        json_record(2, content_type="ima_template", content={"template_name": "ima-ng", "template_data": "aabb"}),
        json_record(3, content_type="own", content={"x": 1}),
    ]
    text = json.dumps(records) if as_array else "\n".join(map(json.dumps, records))
    assert detect(text.encode()) is LogFormat.CEL_JSON
    log = read_log(text.encode())
    assert isinstance(log, UnverifiedLog)
    assert [(event.event_type, event.data) for event in log.events] == [
        (EventType.EV_SEPARATOR, bytes(4)),
        (EventType.EV_EVENT_TAG, b"\0\1\2\3"),
        (IMA_TEMPLATE, b"\xaa\xbb"),
        (CEL_CONTENT, b'{"x":1}'),
    ]
    assert not log.findings
    assert set(replay(log, BANK).values) == {7}


BAD_JSON = [
    '{"pcr": 7, "pcr": 8}',
    "{" * 5000,
    "[" * 100_000,
    '{"pcr": "seven"}',
    '{"pcr": true}',
    '{"pcr": 99999999999}',
    '{"pcr": 7, "digests": [{"hashAlg": "sha256", "digest": "00"}]}',
    '{"pcr": 7, "digests": [{"hashAlg": "none", "digest": "00"}]}',
    '{"pcr": 7, "digests": ["x"]}',
    '{"pcr": NaN}',
    "7",
    '{"pcr": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: text[:20])
def test_json_that_is_no_record_is_a_finding_and_no_exception(text: str) -> None:
    assert names(use_everything(b"\x1e" + text.encode()).findings) >= {"JSON_INVALID"}
    assert names(use_everything(text.encode(), LogFormat.CEL_JSON).findings) >= {"JSON_INVALID"}


# ---- systemd ----------------------------------------------------------------------------------------------------------------


def systemd_record(pcr: int, kind: str, text: str, measured: str | None = None) -> bytes:
    digest = sha256((text if measured is None else measured).encode()).hex()
    content = {"eventType": kind, "string": text, "bootId": "0" * 32}
    value = {"pcr": pcr, "digests": [{"hashAlg": "sha256", "digest": digest}], "content_type": "systemd", "content": content}
    return b"\x1e" + json.dumps(value).encode() + b"\n"


def test_what_systemd_measured_is_read_replayed_and_checked() -> None:
    raw = (
        systemd_record(11, "phase", "enter-initrd")
        + systemd_record(15, "machine-id", "machine-id:0123")
        + systemd_record(15, "volume-key", "cryptsetup:root", "an HMAC is measured")
    )
    log = read_log(raw)
    assert isinstance(log, UnverifiedLog)
    assert log.format is LogFormat.SYSTEMD
    assert [describe(event) for event in log.events][:2] == ["phase: enter-initrd", "machine-id: machine-id:0123"]
    assert [is_proven(event, BANK) for event in log.events] == [True, True, False]
    assert replay(log, BANK).values[11] == sha256(bytes(32) + sha256(b"enter-initrd"))
    assert not log.findings


def test_an_nv_index_that_systemd_extends_is_shown_and_not_replayed() -> None:
    value = {
        "nv_index": 0x1D10200,
        "digests": [{"hashAlg": "sha256", "digest": sha256(b"x").hex()}],
        "content": {"string": "x"},
    }
    log = read_log(b"\x1e" + json.dumps(value).encode())
    assert isinstance(log, UnverifiedLog)
    assert names(log.findings) == {"NOT_A_PCR"}
    assert (len(log.events), replay(log, BANK).values) == (1, {})


def test_of_systemds_log_that_is_cut_the_whole_records_are_read() -> None:
    raw = systemd_record(11, "phase", "enter-initrd") + systemd_record(11, "phase", "leave-initrd")
    log = read_log(raw[:-9])
    assert isinstance(log, UnverifiedLog)
    assert (len(log.events), names(log.findings)) == (1, {"JSON_INVALID"})


def test_an_array_larger_than_is_read_is_a_finding() -> None:
    assert names(read_log(b"[" + b" " * (9 << 20) + b"]").findings) == {"LOG_TOO_LARGE"}


def test_text_of_a_log_can_not_steer_a_terminal() -> None:
    log = read_log(systemd_record(11, "phase", "\x1b[2Jgone\r\n\x07"))
    assert isinstance(log, UnverifiedLog)
    assert all(char.isprintable() for char in describe(log.events[0]))
    event = record(8, EventType.EV_IPL, b"grub_cmd \x1b]0;owned\x07\0")
    assert all(char.isprintable() for char in describe(read(event).events[1]))
