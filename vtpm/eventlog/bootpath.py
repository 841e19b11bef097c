"""How a machine was booted, as its log tells it: firmware, loaders, kernel, command line, initrd, and where the firmware ended.

A log from a guest can say anything about what its digests don't prove, so each step carries what its digest proves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog.checks import Proof, proof_of
from vtpm.eventlog.describe import (
    COMMAND_LINE_PREFIXES,
    LINUX_INITRD,
    LINUX_LOAD_OPTIONS,
    SYSTEMD_LOADER_CONF,
    describe,
    plain_text,
    printable,
)
from vtpm.eventlog.devicepath import QEMU_KERNEL_LOADER, describe_device_path, file_name
from vtpm.eventlog.types import IMAGES, EventType
from vtpm.eventlog.uefi import parse_image, parse_tag, parse_variable
from vtpm.eventlog.values import SYSTEMD_CONTENT, UnverifiedEvent, UnverifiedLog
from vtpm.eventlog.wbcl import is_sipa

MAX_STEPS: Final = 4096
UKI_SECTIONS: Final = (
    ".linux",
    ".osrel",
    ".cmdline",
    ".initrd",
    ".ucode",
    ".splash",
    ".dtb",
    ".uname",
    ".sbat",
    ".pcrpkey",
    ".profile",
    ".dtbauto",
    ".hwids",
    ".efifw",
)


@dataclass(frozen=True, slots=True)
class BootStep:
    """One step of a boot: what kind of step, what the log says, the event's number and register, and what its digest proves."""

    kind: str
    text: str
    event: int
    register: int
    proof: Proof
    digest: bytes


@dataclass(frozen=True, slots=True)
class UnverifiedBoot:
    """A boot in words; as true as the replay of its log, and only where a step's digest proves its text.

    `loaders` names what was recognised, in the order of boot. `exit_boot_services` is whether the firmware said that it
    handed over; none where the log has no such event.
    """

    firmware_version: str
    loaders: tuple[str, ...]
    command_lines: tuple[str, ...]
    initrds: tuple[bytes, ...]
    exit_boot_services: bool | None
    steps: tuple[BootStep, ...]


def _image_kind(event: UnverifiedEvent) -> str:
    return "driver" if event.event_type != EventType.EV_EFI_BOOT_SERVICES_APPLICATION else "image"


def _text_kind(event: UnverifiedEvent) -> str:
    text = plain_text(event.data) or ""
    if text.startswith("grub_cmd"):
        return "grub command"
    if text.startswith(COMMAND_LINE_PREFIXES):
        return "command line"
    if text.startswith("grub_linuxefi"):
        return "initrd" if text.endswith("Initrd") else "kernel"
    if text in UKI_SECTIONS:
        return "uki section"
    if text.startswith("MokList"):
        return "mok"
    if event.register == 12 or _is_wide(event.data):
        return "command line"
    return "file"


def _is_wide(data: bytes) -> bool:
    return len(data) > 3 and data[1] == 0 and data[3] == 0


def _tag_kind(event: UnverifiedEvent) -> str:
    if is_sipa(event.data):
        return "windows"
    tag = parse_tag(event.data)
    return {LINUX_INITRD: "initrd", LINUX_LOAD_OPTIONS: "command line", SYSTEMD_LOADER_CONF: "loader.conf"}.get(
        tag[0] if tag else 0, "tag"
    )


_KINDS: Final[dict[int, Callable[[UnverifiedEvent], str]]] = {
    EventType.EV_S_CRTM_VERSION: lambda _: "firmware version",
    EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB: lambda _: "firmware",
    EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB2: lambda _: "firmware",
    EventType.EV_EFI_VARIABLE_AUTHORITY: lambda _: "authority",
    EventType.EV_EFI_ACTION: lambda _: "action",
    EventType.EV_SEPARATOR: lambda _: "separator",
    EventType.EV_IPL: _text_kind,
    EventType.EV_EVENT_TAG: _tag_kind,
    EventType.EV_COMPACT_HASH: lambda _: "windows",
    SYSTEMD_CONTENT: lambda _: "userspace",
    **dict.fromkeys(IMAGES, _image_kind),
}


def _path_has(*names: str) -> Callable[[UnverifiedEvent, str], bool]:
    def recognised(event: UnverifiedEvent, kind: str) -> bool:
        if kind != "image":
            return False
        image = parse_image(event.data)
        return image is not None and any(name in file_name(image.device_path).lower() for name in names)

    return recognised


def _kind_is(*kinds: str) -> Callable[[UnverifiedEvent, str], bool]:
    return lambda _event, kind: kind in kinds


def _is_shim(event: UnverifiedEvent, kind: str) -> bool:
    if kind == "mok":
        return True
    variable = parse_variable(event.data) if kind == "authority" else None
    return variable is not None and variable.name in {"SbatLevel", "MokListTrusted", "Shim", "vendor_db"}


def _is_direct(event: UnverifiedEvent, kind: str) -> bool:
    image = parse_image(event.data) if kind == "image" else None
    return image is not None and QEMU_KERNEL_LOADER in describe_device_path(image.device_path)


def _is_td_payload(event: UnverifiedEvent, kind: str) -> bool:
    return kind == "firmware" and b"td_payload" in event.data


def _is_systemd_boot(event: UnverifiedEvent, kind: str) -> bool:
    return kind == "loader.conf" or (kind == "command line" and event.event_type == EventType.EV_IPL and _is_wide(event.data))


def _is_linux_stub(event: UnverifiedEvent, kind: str) -> bool:
    return event.event_type == EventType.EV_EVENT_TAG and kind in {"initrd", "command line"}


# What each loader is recognised by. A new one is a new row.
LOADERS: Final[tuple[tuple[str, Callable[[UnverifiedEvent, str], bool]], ...]] = (
    ("shim", _path_has("shim")),
    ("shim", _is_shim),
    ("GRUB", _path_has("grub")),
    ("GRUB", _kind_is("grub command")),
    ("systemd-boot", _path_has("systemd-boot")),
    ("systemd-boot or systemd-stub", _is_systemd_boot),
    ("UKI", _kind_is("uki section")),
    ("kernel given by QEMU", _is_direct),
    ("td-shim", _is_td_payload),
    ("Windows boot manager", _path_has("bootmgfw")),
    ("Windows", _kind_is("windows")),
    ("Linux", _is_linux_stub),
    ("systemd userspace", _kind_is("userspace")),
)


def boot_path(log: UnverifiedLog, bank: int) -> UnverifiedBoot:
    """Return how the machine was booted, by the events that `bank` has a digest of."""
    steps: list[BootStep] = []
    loaders: list[str] = []
    lines: list[str] = []
    initrds: list[bytes] = []
    version, exited = "", None
    for event in log.events:
        kind_of = _KINDS.get(event.event_type)
        if kind_of is None or len(steps) >= MAX_STEPS:
            continue
        kind, text = kind_of(event), describe(event)
        digest = event.digests.get(bank, b"")
        steps.append(BootStep(kind, text, event.number, event.register, proof_of(event, bank)[0], digest))
        for name, recognise in LOADERS:
            if name not in loaders and recognise(event, kind):
                loaders.append(name)
        if kind == "firmware version":
            version = version or _version(event.data)
        elif kind == "command line" and event.event_type == EventType.EV_IPL:
            lines.append(_command_line(event))
        elif kind == "initrd":
            initrds.append(digest)
        elif kind == "action" and event.data.startswith(b"Exit Boot Services Returned"):
            exited = event.data.endswith(b"Success")
    return UnverifiedBoot(version, tuple(loaders), tuple(dict.fromkeys(lines)), tuple(initrds), exited, tuple(steps))


def _version(data: bytes) -> str:
    return printable(plain_text(data) or (data.hex() if any(data) else ""))


def _command_line(event: UnverifiedEvent) -> str:
    text = plain_text(event.data) or ""
    prefix, _, line = text.partition(" ")
    return printable(line if prefix.rstrip(":") in COMMAND_LINE_PREFIXES else text)


def step_line(step: BootStep) -> str:
    """Return a step in one line, with a mark where its text is not proven by its digest."""
    mark = "" if step.proof in {Proof.DATA, Proof.VALUE, Proof.PART} else " (text not proven)"
    return f"{step.kind}: {step.text}{mark}"
