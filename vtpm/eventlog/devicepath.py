"""Device paths in words (UEFI 2.10, 10.3)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from vtpm.eventlog.uefi import guid, utf16

MAX_NODES: Final = 64
MAX_TEXT: Final = 2048
_NODE: Final = struct.Struct("<BBH")
_END: Final = 0x7F
# The GUID under which OVMF gives the kernel, initrd and command line that QEMU was started with (-kernel).
QEMU_KERNEL_LOADER: Final = "1428f772-b64a-441e-b8c3-9ebdd7f893c7"


def _pci(body: bytes) -> str:
    return f"Pci({body[1]:x},{body[0]:x})"


def _acpi(body: bytes) -> str:
    (hid, uid) = struct.unpack_from("<II", body)
    return f"PciRoot({uid:x})" if hid in {0x0A0341D0, 0x0A0841D0} else f"Acpi({hid:08x},{uid:x})"


def _hard_drive(body: bytes) -> str:
    (number,) = struct.unpack_from("<I", body)
    kind = body[37]
    if kind == 2:
        return f"partition {number} ({guid(body[20:36])})"
    return f"partition {number} (MBR {int.from_bytes(body[20:24], 'little'):08x})"


def _file(body: bytes) -> str:
    return utf16(body)


def _guid_of(word: str) -> Callable[[bytes], str]:
    return lambda body: f"{word}({guid(body[:16])})"


def _mac(body: bytes) -> str:
    return f"MAC({body[:6].hex(':')})"


def _uri(body: bytes) -> str:
    return body.decode("ascii", "replace")


def _nvme(body: bytes) -> str:
    return f"NVMe({int.from_bytes(body[:4], 'little'):x})"


def _scsi(body: bytes) -> str:
    return "Scsi({:x},{:x})".format(*struct.unpack_from("<HH", body))


def _sata(body: bytes) -> str:
    return "Sata({:x},{:x},{:x})".format(*struct.unpack_from("<HHH", body))


def _usb(body: bytes) -> str:
    return f"USB({body[0]:x},{body[1]:x})"


def _option_rom(body: bytes) -> str:
    return "option ROM at bytes {:#x} to {:#x}".format(*struct.unpack_from("<4xQQ", body))


def _memory(body: bytes) -> str:
    return "memory {:#x} to {:#x}".format(*struct.unpack_from("<4xQQ", body))


# By type and subtype: the least size of the node's body in bytes, and its words.
_NODES: Final[dict[tuple[int, int], tuple[int, Callable[[bytes], str]]]] = {
    (1, 1): (2, _pci),
    (1, 3): (20, _memory),
    (1, 4): (16, _guid_of("vendor hardware ")),
    (2, 1): (8, _acpi),
    (3, 2): (4, _scsi),
    (3, 5): (2, _usb),
    (3, 10): (16, _guid_of("vendor messaging ")),
    (3, 11): (32, _mac),
    (3, 12): (0, lambda _: "IPv4"),
    (3, 13): (0, lambda _: "IPv6"),
    (3, 18): (6, _sata),
    (3, 23): (12, _nvme),
    (3, 24): (0, _uri),
    (4, 1): (38, _hard_drive),
    (4, 2): (4, lambda _: "CD"),
    (4, 3): (16, _guid_of("vendor media ")),
    (4, 4): (2, _file),
    (4, 6): (16, _guid_of("firmware file ")),
    (4, 7): (16, _guid_of("firmware volume ")),
    (4, 8): (20, _option_rom),
    (5, 1): (2, lambda body: f"legacy boot ({body[4:].split(bytes(1))[0].decode('ascii', 'replace')})"),
}


def describe_device_path(path: bytes) -> str:
    """Return a device path in words; what can't be read is said so, never an error."""
    parts: list[str] = []
    offset = 0
    while offset + _NODE.size <= len(path):
        kind, subtype, size = _NODE.unpack_from(path, offset)
        if kind == _END and subtype == 0xFF:
            break
        if size < _NODE.size or offset + size > len(path) or len(parts) >= MAX_NODES:
            parts.append("…")
            break
        body = path[offset + _NODE.size : offset + size]
        offset += size
        if kind == _END:
            parts.append("or")
            continue
        least, words = _NODES.get((kind, subtype), (0, None))
        parts.append(words(body) if words and len(body) >= least else f"node {kind}.{subtype}")
    return "/".join(parts)[:MAX_TEXT]


def file_name(path: bytes) -> str:
    r"""Return the file that a device path ends in, such as `\EFI\BOOT\BOOTX64.EFI`; empty where it names none."""
    offset = 0
    names: list[str] = []
    while offset + _NODE.size <= len(path) and len(names) < MAX_NODES:
        kind, subtype, size = _NODE.unpack_from(path, offset)
        if size < _NODE.size or offset + size > len(path) or (kind, subtype) == (_END, 0xFF):
            break
        if (kind, subtype) == (4, 4):
            names.append(utf16(path[offset + _NODE.size : offset + size]))
        offset += size
    return "\\".join(names).replace("\\\\", "\\")[:MAX_TEXT]
