"""Events in words. The words are the log's own: what is not proven by a digest is not proven by being readable."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Final

from vtpm.eventlog import strictjson
from vtpm.eventlog.cel import describe_content
from vtpm.eventlog.devicepath import QEMU_KERNEL_LOADER, describe_device_path, file_name
from vtpm.eventlog.replay import STARTUP_LOCALITY
from vtpm.eventlog.tcg import SPEC_ID_SIGNATURE
from vtpm.eventlog.types import EventType, type_name
from vtpm.eventlog.uefi import (
    SHIM_LOCK,
    UnverifiedVariable,
    parse_gpt,
    parse_image,
    parse_load_option,
    parse_signature_lists,
    parse_tag,
    parse_variable,
)
from vtpm.eventlog.values import CEL_CONTENT, SYSTEMD_CONTENT, UnverifiedEvent
from vtpm.eventlog.wbcl import describe_sipa, is_sipa

MAX_WORDS: Final = 4096
# Data in bytes that are looked at to find a text or a name in them.
MAX_TEXT_DATA: Final = 1 << 16
COMMAND_LINE_PREFIXES: Final = ("kernel_cmdline", "grub_kernel_cmdline", "module_cmdline")
_PRINTABLE: Final = frozenset(string.printable) - frozenset("\x0b\x0c")
# Tags of EV_EVENT_TAG (Linux: drivers/firmware/efi/libstub; systemd: TPM2_PCR_MEASUREMENTS; Confidential Containers: AAEL).
LINUX_INITRD: Final = 0x8F3B22EC
LINUX_LOAD_OPTIONS: Final = 0x8F3B22ED
SYSTEMD_LOADER_CONF: Final = 0xF5BC582A
AAEL: Final = 0x4141454C
TAGS: Final = {
    LINUX_INITRD: "initrd that Linux's boot stub loaded",
    LINUX_LOAD_OPTIONS: "command line that Linux's boot stub got",
    SYSTEMD_LOADER_CONF: "systemd-boot's loader.conf",
    0x6C46F751: "device tree add-on",
    0x49DFFE0F: "initrd add-on",
    0xDAC08E1A: "microcode add-on",
    0xD5CB7CBC: "SMBIOS system information",
    0xE0D47BC8: "SMBIOS baseboard information",
    0xC0B3BD23: "SMBIOS OEM strings",
    AAEL: "application",
}


def printable(text: str) -> str:
    """Return text of a log as a terminal may show it: one line, no control characters, of bounded length."""
    shown = "".join(
        char if char in _PRINTABLE or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:MAX_WORDS]
    )
    return " ".join(shown.split())


def count_of(entries: int) -> str:
    """Return how many entries a database has, in words."""
    return "1 entry" if entries == 1 else f"{entries} entries"


def plain_text(data: bytes) -> str | None:
    """Return the text that data are, ASCII or UTF-16, without ending zeros; none where they are no text."""
    if len(data) > MAX_TEXT_DATA:
        return None
    body = data.rstrip(b"\0")
    if body[-2:-1] == b"\0":
        # Some builds of GRUB log one byte behind the zero that ends the text (TEXT_ONE_BYTE_MORE).
        body = body[:-1].rstrip(b"\0")
    if not body:
        return None
    if len(data) > 3 and data[1] == 0 and data[3] == 0:
        wide = data[: len(data) & ~1].decode("utf-16-le", "replace").rstrip("\0")
        if wide and all(char in _PRINTABLE or char.isprintable() for char in wide):
            return wide
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if all(char in _PRINTABLE or char.isprintable() for char in text) else None


def describe(event: UnverifiedEvent) -> str:
    """Return what an event says, in one line."""
    words = _WORDS.get(event.event_type)
    text = words(event.data) if words else None
    if text is None:
        text = plain_text(event.data)
    if text is None:
        text = f"{len(event.data)} bytes {event.data[:24].hex()}{'…' if len(event.data) > 24 else ''}" if event.data else ""
    return printable(text)


def _no_action(data: bytes) -> str | None:
    if data.startswith(SPEC_ID_SIGNATURE):
        return "the log's head: Spec ID Event03"
    if data.startswith(STARTUP_LOCALITY):
        return f"the TPM was started from locality {data[len(STARTUP_LOCALITY) :].hex() or '?'}"
    if data.startswith(b"SP800-155 Event"):
        return "where the firmware's reference values are: SP800-155 event"
    if is_sipa(data):
        return describe_sipa(data)
    return None


def _separator(data: bytes) -> str | None:
    known = {b"\0\0\0\0": "end of the firmware's measurements", b"\xff\xff\xff\xff": "end of the firmware's measurements"}
    if data == b"\1\0\0\0":
        return "the firmware says that measuring failed"
    return known.get(data)


def _variable(data: bytes) -> str | None:
    variable = parse_variable(data)
    if variable is None:
        return None
    return f"variable {describe_variable(variable)}"


def describe_variable(variable: UnverifiedVariable) -> str:
    """Return a variable's name and what it holds, in words."""
    name, value = variable.name, variable.value
    if name in {"PK", "KEK", "db", "dbx", "dbt", "dbr", "MokList", "MokListX"} and value:
        signatures, wrong = parse_signature_lists(value)
        if signatures and not wrong:
            return f"{name}: {count_of(len(signatures))}"
    if name == "BootOrder":
        return f"{name}: " + ", ".join(f"{int.from_bytes(value[at : at + 2], 'little'):04x}" for at in range(0, len(value), 2))
    if name.startswith("Boot") and len(name) == 8:
        option = parse_load_option(value)
        if option is not None:
            off = "" if option.active else " (not active)"
            return f"{name}: {option.description}{off}, {describe_device_path(option.device_path)}"
    if not value:
        return f"{name}: empty"
    if len(value) == 1:
        return f"{name} = {value[0]}"
    text = plain_text(value) if variable.vendor == SHIM_LOCK or len(value) < 64 else None
    return f"{name}: {text}" if text else f"{name}: {len(value)} bytes"


def _authority(data: bytes) -> str | None:
    variable = parse_variable(data)
    if variable is None:
        return None
    value = variable.value
    if variable.name in {"db", "dbx", "KEK", "PK"} and len(value) > 16:
        return f"authority from {variable.name}: {certificate_subject(value[16:]) or f'{len(value) - 16} bytes'}"
    if variable.name in {"Shim", "MokList", "vendor_db"}:
        return f"authority from {variable.name}: {certificate_subject(value) or f'{len(value)} bytes'}"
    return f"authority {describe_variable(variable)}"


def certificate_subject(der: bytes) -> str | None:
    """Return the last common name in a certificate in DER, which is the subject's; none where there is none.

    The name is for reading only. It is looked for by its OID, so that certificates which strict parsers refuse are named too.
    """
    oid, der = b"\x06\x03\x55\x04\x03", der[:MAX_TEXT_DATA]
    name, at = None, der.find(oid)
    while at >= 0 and at + 7 <= len(der):
        tag, size = der[at + 5], der[at + 6]
        if tag in {0x0C, 0x13, 0x14, 0x16, 0x1E} and size < 0x80:
            raw = der[at + 7 : at + 7 + size]
            name = raw.decode("utf-16-be" if tag == 0x1E else "utf-8", "replace")
        at = der.find(oid, at + 5)
    return printable(name) if name else None


def _image(data: bytes) -> str | None:
    image = parse_image(data)
    if image is None:
        return None
    path = describe_device_path(image.device_path)
    if QEMU_KERNEL_LOADER in path:
        path = f"given by QEMU: {file_name(image.device_path) or 'kernel'}"
    return f"image of {image.size} bytes from {path or 'memory'}"


def _gpt(data: bytes) -> str | None:
    table = parse_gpt(data)
    if table is None:
        return None
    disk, partitions = table
    names = ", ".join(partition.name or str(partition.type_guid) for partition in partitions[:16])
    return f"partition table of disk {disk}: {names}"


def _blob(data: bytes) -> str | None:
    if len(data) == 16:
        return f"firmware volume at {int.from_bytes(data[:8], 'little'):#x}, {int.from_bytes(data[8:], 'little')} bytes"
    if len(data) > 17 and len(data) == 17 + data[0]:
        name = data[1 : 1 + data[0]].decode("ascii", "replace").rstrip("\0")
        return f"firmware volume {name}, {int.from_bytes(data[-8:], 'little')} bytes"
    return None


def _version(data: bytes) -> str:
    return f"firmware version {plain_text(data) or (data[:64].hex() if any(data) else 'not given')}"


def _tagged(data: bytes) -> str | None:
    if is_sipa(data):
        return describe_sipa(data)
    tag = parse_tag(data)
    if tag is None:
        return None
    text = plain_text(tag[1]) or ""
    what = TAGS.get(tag[0])
    return f"{what}: {text}" if what else f"tag 0x{tag[0]:08x}: {text}"


def _ipl(data: bytes) -> str | None:
    return plain_text(data)


def _content(data: bytes) -> str | None:
    try:
        value = strictjson.load(data)
    except ValueError:
        return describe_content(data)
    if not isinstance(value, dict):
        return None
    kind, text = value.get("eventType"), value.get("string")
    if isinstance(text, str):
        return f"{kind}: {text}" if isinstance(kind, str) else text
    return strictjson.dump(value).decode()


_WORDS: Final[dict[int, Callable[[bytes], str | None]]] = {
    EventType.EV_NO_ACTION: _no_action,
    EventType.EV_SEPARATOR: _separator,
    EventType.EV_EFI_VARIABLE_DRIVER_CONFIG: _variable,
    EventType.EV_EFI_VARIABLE_BOOT: _variable,
    EventType.EV_EFI_VARIABLE_BOOT2: _variable,
    EventType.EV_EFI_VARIABLE_AUTHORITY: _authority,
    EventType.EV_EFI_BOOT_SERVICES_APPLICATION: _image,
    EventType.EV_EFI_BOOT_SERVICES_DRIVER: _image,
    EventType.EV_EFI_RUNTIME_SERVICES_DRIVER: _image,
    EventType.EV_EFI_GPT_EVENT: _gpt,
    EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB: _blob,
    EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB2: _blob,
    EventType.EV_S_CRTM_VERSION: _version,
    EventType.EV_EVENT_TAG: _tagged,
    EventType.EV_IPL: _ipl,
    SYSTEMD_CONTENT: _content,
    CEL_CONTENT: _content,
}


def subject_of(event: UnverifiedEvent) -> str:
    """Return which thing an event is about, without its content: what stays the same when the thing changes.

    Two logs are compared by it: the variable of this name, the image from this path, the command line.
    """
    kind, data = event.event_type, event.data
    if kind in _WORDS and _WORDS[kind] in {_variable, _authority}:
        variable = parse_variable(data)
        return f"{type_name(kind)}:{variable.vendor}:{variable.name}" if variable else type_name(kind)
    if kind in _WORDS and _WORDS[kind] is _image:
        image = parse_image(data)
        return f"image:{file_name(image.device_path) or describe_device_path(image.device_path)}" if image else "image"
    if kind == EventType.EV_EVENT_TAG:
        tag = parse_tag(data)
        return f"tag:{tag[0]:08x}" if tag else "tag"
    if kind == EventType.EV_IPL:
        text = plain_text(data) or ""
        for prefix in (*COMMAND_LINE_PREFIXES, "grub_cmd"):
            if text.startswith(prefix):
                words = text.split(maxsplit=2)
                return f"text:{prefix}:{words[1] if prefix == 'grub_cmd' and len(words) > 1 else ''}"
        return f"text:{text}" if text.startswith((".", "/", "(", "Mok", "grub_linuxefi")) else "text"
    return type_name(kind)
