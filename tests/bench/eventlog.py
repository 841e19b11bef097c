"""Event logs: parse and replay beside hashing the same bytes, and IMA lists of two lengths."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable

from tests.bench.measure import Row, alternate, micros
from tests.support.eventlogs import (
    BANK,
    LINUX_INITRD,
    LINUX_OPTIONS,
    action,
    driver_config,
    file_path,
    image,
    log_of,
    record,
    separator,
    tagged,
)
from vtpm.eventlog.hashes import SHA1
from vtpm.eventlog.ima import read_ima_binary, replay_ima
from vtpm.eventlog.replay import replay
from vtpm.eventlog.tcg import read_tcg
from vtpm.eventlog.types import EventType

_SHORT, _LONG = 5_000, 500_000


def _log() -> bytes:
    """A log of 35 events and 16 KB, which are the usual sizes: variables, two images, a command line, an initrd."""
    return log_of(
        record(0, EventType.EV_S_CRTM_VERSION, "1.0".encode("utf-16-le")),
        *(record(0, EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB, bytes([index]) * 16) for index in range(4)),
        driver_config("SecureBoot", b"\1"),
        driver_config("PK", bytes(1000)),
        driver_config("KEK", bytes(2500)),
        driver_config("db", bytes(4600)),
        driver_config("dbx", bytes(5000)),
        separator(7),
        *(record(1, EventType.EV_EFI_VARIABLE_BOOT, bytes([index]) * 200) for index in range(6)),
        action("Calling EFI Application from Boot Option"),
        *(separator(register) for register in range(7)),
        record(5, EventType.EV_EFI_GPT_EVENT, bytes(740)),
        image(file_path("\\EFI\\BOOT\\BOOTX64.EFI"), b"loader"),
        image(file_path("\\vmlinuz"), b"kernel"),
        tagged(9, LINUX_OPTIONS, b"LOADED_IMAGE::LoadOptions\0", b"line"),
        tagged(9, LINUX_INITRD, b"Linux initrd\0", b"initrd"),
        *(action(text, 5) for text in ("Exit Boot Services Invocation", "Exit Boot Services Returned with Success")),
        record(14, EventType.EV_IPL, b"MokList\0"),
        record(14, EventType.EV_IPL, b"MokListX\0"),
        record(8, EventType.EV_IPL, b"grub_cmd: set default=1\0"),
    )


def _list(entries: int) -> bytes:
    def field(data: bytes) -> bytes:
        return struct.pack("<I", len(data)) + data

    made = []
    for number in range(entries):
        data = field(b"sha256:\0" + hashlib.sha256(number.to_bytes(4)).digest()) + field(b"/usr/lib/file-%06d\0" % number)
        made.append(struct.pack("<I", 10) + hashlib.sha1(data).digest() + field(b"ima-ng") + field(data))
    return b"".join(made)


def _timed(work: Callable[[], object], rounds: int) -> float:
    """Processor time in seconds of one round: nothing here waits, and other processes are not to count."""
    start = time.process_time()
    for _ in range(rounds):
        work()
    return (time.process_time() - start) / rounds


def eventlog() -> list[Row]:
    """Parse and replay one bank of a usual log; read, check and replay IMA lists of two lengths."""
    log = _log()
    events = len(read_tcg(log).events)
    assert events == 36, "35 events and the head"
    ours, once = alternate(
        15, lambda: _timed(lambda: replay(read_tcg(log), BANK), 200), lambda: _timed(lambda: hashlib.sha256(log).digest(), 2000)
    )
    short, long = _list(_SHORT), _list(_LONG)

    def per_entry(data: bytes, entries: int, rounds: int) -> float:
        return _timed(lambda: replay_ima(read_ima_binary(data), SHA1), rounds) / entries

    few, many = alternate(5, lambda: per_entry(short, _SHORT, 20), lambda: per_entry(long, _LONG, 1))
    return [
        _row(f"parse and replay a log of 35 events, {len(log)} bytes (peer: hashing them once)", ours, once, 20),
        _row(f"an entry of an IMA list of {_LONG} (peer: of {_SHORT})", many, few, 1.1),
    ]


def _row(what: str, ours: float, peer: float, bound: float) -> Row:
    ratio = ours / peer
    return Row(what, micros(ours), micros(peer), f"{ratio:.2f}", f"≤ {bound:g} × peer", within=ratio <= bound)
