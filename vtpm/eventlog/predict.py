"""The register values of a boot that has not happened yet: of a UKI, or of a kernel with its initrd and command line.

With the log of an earlier boot of the same machine as a base, its events are kept and those of the kernel are replaced:
what the firmware, its variables and its loaders measured stays. Without a base only what the files alone decide is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.eventlog.bootpath import UKI_SECTIONS
from vtpm.eventlog.describe import LINUX_INITRD, LINUX_LOAD_OPTIONS, describe
from vtpm.eventlog.devicepath import QEMU_KERNEL_LOADER, describe_device_path
from vtpm.eventlog.hashes import SIZES, digest, name
from vtpm.eventlog.pe import PeImage, parse_pe
from vtpm.eventlog.replay import replay_events
from vtpm.eventlog.types import EventType
from vtpm.eventlog.uefi import TAG, parse_image, parse_tag
from vtpm.eventlog.values import UnverifiedEvent, UnverifiedLog

PCR_BOOT_LOADER: Final = 4
PCR_KERNEL: Final = 9
PCR_UKI: Final = 11
# The first version of systemd-stub that measures a section; those that are not named are measured since 252. What a stub
# carries for itself, such as .sbat, is in the image whether it is measured or not.
_MEASURED_SINCE: Final = {
    ".uname": 254,
    ".sbat": 254,
    ".ucode": 256,
    ".profile": 257,
    ".dtbauto": 257,
    ".hwids": 257,
    ".efifw": 258,
}
_STUB_VERSION: Final = re.compile(rb"systemd-stub (\d{3})")


@dataclass(frozen=True, slots=True)
class PredictedEvent:
    """One event of the boot to come; `predicted` is false where it is taken from the base."""

    register: int
    digest: bytes
    text: str
    predicted: bool


@dataclass(frozen=True, slots=True)
class Prediction:
    """The values to come of the registers that can be predicted, how they come about, and what was assumed."""

    bank: int
    values: dict[int, bytes]
    events: tuple[PredictedEvent, ...]
    assumptions: tuple[str, ...]


@dataclass(slots=True)
class _Making:
    """A prediction that is being made."""

    bank: int
    events: list[UnverifiedEvent] = field(default_factory=list)
    new: set[int] = field(default_factory=set)
    assumptions: list[str] = field(default_factory=list)

    def hash(self, data: bytes) -> bytes:
        made = digest(self.bank, data)
        if made is None:
            raise InvalidArgumentError("PCR_BANK_UNKNOWN", f"there is no hash {name(self.bank)} here")
        return made

    def keep(self, event: UnverifiedEvent) -> None:
        self._add(event.register, event.event_type, event.digests, event.data)

    def add(self, register: int, event_type: int, value: bytes, data: bytes) -> None:
        self.new.add(len(self.events))
        self._add(register, event_type, {self.bank: value}, data)

    def _add(self, register: int, event_type: int, digests: Mapping[int, bytes], data: bytes) -> None:
        self.events.append(UnverifiedEvent(len(self.events), register, event_type, digests, data, 0))

    def done(self, registers: Iterable[int] | None = None) -> Prediction:
        values = replay_events(self.events, self.bank).values
        wanted = set(values) if registers is None else set(registers) & set(values)
        shown = tuple(
            PredictedEvent(event.register, event.digests.get(self.bank, b""), describe(event), event.number in self.new)
            for event in self.events
            if event.register in wanted and event.event_type != EventType.EV_NO_ACTION
        )
        kept = {register: values[register] for register in sorted(wanted)}
        return Prediction(self.bank, kept, shown, tuple(self.assumptions))


def predict_uki(uki: bytes, bank: int, base: UnverifiedLog | None = None) -> Prediction:
    """Return the registers of a boot of a unified kernel image.

    Raises:
        InvalidArgumentError: PE_INVALID, UKI_INVALID, PREDICTION_BASE_UNFIT or PCR_BANK_UNKNOWN.
    """
    image = parse_pe(uki)
    kernel = image.section(".linux")
    if kernel is None:
        raise InvalidArgumentError("UKI_INVALID", "the image has no section .linux", remedy="give --kernel for a bare kernel")
    making = _Making(bank)
    if base is None:
        _sections(making, image)
        making.assumptions.append("PCR 11 as systemd-stub leaves it, before userspace measures boot phases")
        return making.done()
    _fit(base, bank)
    making.assumptions.append("the firmware, its settings and the loaders before the UKI stay as in the base")
    places = _applications(base)
    # Since systemd 252 the firmware is asked to load the inner kernel too and measures it; a base with a UKI shows whether.
    was_uki = [event for event in base.events if event.register == PCR_UKI and _is_section(event)]
    inner = bool(was_uki) and len(places) > 1 and _is_from_memory(places[-1])
    replaced = {places[-2 if inner else -1].number: image.authenticode(bank)}
    if inner:
        replaced[places[-1].number] = parse_pe(kernel).authenticode(bank)
    initrd = image.section(".initrd")
    line = image.section(".cmdline")
    _replay_base(making, base, replaced, initrd, None, skip_sections=True)
    _sections(making, image)
    if initrd is not None:
        making.assumptions.append("no credentials, system extensions or add-ons, which change PCRs 9, 12 and 13")
    if line is not None:
        making.assumptions.append("the command line of the UKI alone; one that is passed to it is measured into PCR 12")
    registers = {PCR_BOOT_LOADER, PCR_UKI} | {event.register for event in base.events if event.register < 8}
    return making.done(registers)


def predict_kernel(
    kernel: bytes, initrd: bytes | None, command_line: str | None, bank: int, base: UnverifiedLog | None = None
) -> Prediction:
    """Return the registers of a boot of a bare kernel whose boot stub measures its initrd and command line.

    Without a base PCR 4 is that of a firmware which starts the kernel from a boot option, and nothing before it.

    Raises:
        InvalidArgumentError: PE_INVALID, PREDICTION_BASE_UNFIT or PCR_BANK_UNKNOWN.
    """
    image = parse_pe(kernel)
    making = _Making(bank)
    if base is None:
        action = b"Calling EFI Application from Boot Option"
        making.add(PCR_BOOT_LOADER, EventType.EV_EFI_ACTION, making.hash(action), action)
        making.add(PCR_BOOT_LOADER, EventType.EV_SEPARATOR, making.hash(bytes(4)), bytes(4))
        making.add(PCR_BOOT_LOADER, EventType.EV_EFI_BOOT_SERVICES_APPLICATION, image.authenticode(bank), b"")
        making.assumptions.append("PCR 4 of a firmware that starts the kernel from a boot option and nothing before it")
        if command_line is not None:
            _add_tag(making, LINUX_LOAD_OPTIONS, b"LOADED_IMAGE::LoadOptions\0", _load_options(command_line))
        if initrd is not None:
            _add_tag(making, LINUX_INITRD, b"Linux initrd\0", initrd)
        making.assumptions.append("PCR 9 as Linux's boot stub leaves it, if it is given the initrd by the firmware")
        return making.done()
    _fit(base, bank)
    places = _applications(base)
    direct = [event for event in places if _is_given_by_qemu(event)]
    making.assumptions.append("the firmware, its settings and the loaders before the kernel stay as in the base")
    replaced = {(direct or places)[-1].number: image.authenticode(bank)}
    options = _load_options(command_line) if command_line is not None else None
    if direct and options is not None and initrd is not None:
        options = _load_options(f"{command_line} initrd=initrd")
        making.assumptions.append("OVMF appends ` initrd=initrd` to the command line that QEMU gives it")
    _replay_base(making, base, replaced, initrd, options, skip_sections=False)
    if not direct:
        return making.done()
    # QEMU writes addresses of the VM's memory into the header of a kernel that it is started with.
    making.assumptions.append("QEMU changes the kernel that it gives to the firmware, so PCR 4 is left out")
    return making.done({event.register for event in base.events} - {PCR_BOOT_LOADER})


def _load_options(command_line: str) -> bytes:
    return command_line.encode("utf-16-le", "surrogatepass") + b"\0\0"


def _add_tag(making: _Making, tag: int, text: bytes, measured: bytes) -> None:
    making.add(PCR_KERNEL, EventType.EV_EVENT_TAG, making.hash(measured), TAG.pack(tag, len(text)) + text)


def _sections(making: _Making, image: PeImage) -> None:
    version = _STUB_VERSION.search(image.section(".sdmagic") or b"")
    if version is None:
        making.assumptions.append("a systemd-stub of version 258 or newer, since the image does not name its stub's version")
    # systemd-stub measures each section's name with its zero, then its content (UAPI.5).
    for section in UKI_SECTIONS:
        content = image.section(section)
        if content is not None and (version is None or int(version[1]) >= _MEASURED_SINCE.get(section, 0)):
            label = section.encode("utf-16-le") + b"\0\0"
            making.add(PCR_UKI, EventType.EV_IPL, making.hash(section.encode() + b"\0"), label)
            making.add(PCR_UKI, EventType.EV_IPL, making.hash(content), label)


def _is_section(event: UnverifiedEvent) -> bool:
    return event.event_type == EventType.EV_IPL and describe(event) in UKI_SECTIONS


def _applications(base: UnverifiedLog) -> Sequence[UnverifiedEvent]:
    return [
        event
        for event in base.events
        if event.event_type == EventType.EV_EFI_BOOT_SERVICES_APPLICATION and event.register == PCR_BOOT_LOADER
    ]


def _is_given_by_qemu(event: UnverifiedEvent) -> bool:
    image = parse_image(event.data)
    return image is not None and QEMU_KERNEL_LOADER in describe_device_path(image.device_path)


def _is_from_memory(event: UnverifiedEvent) -> bool:
    image = parse_image(event.data)
    path = describe_device_path(image.device_path) if image is not None else ""
    return not path or path.startswith(("memory", "vendor"))


def _fit(base: UnverifiedLog, bank: int) -> None:
    if any(event.event_type == EventType.EV_IPL and describe(event).startswith("grub_cmd") for event in base.events):
        raise InvalidArgumentError(
            "PREDICTION_BASE_UNFIT",
            "the base log is of a boot with GRUB, whose commands and files can't be predicted from a kernel",
            remedy="compare two boots with vtpm eventlog explain",
        )
    if base.td or bank not in base.banks or bank not in SIZES or not _applications(base):
        raise InvalidArgumentError(
            "PREDICTION_BASE_UNFIT",
            f"the base log has no {name(bank)} bank, or no image that was started",
            remedy="give the TPM event log of a boot of the same machine",
        )


def _replay_base(
    making: _Making,
    base: UnverifiedLog,
    replaced: dict[int, bytes],
    initrd: bytes | None,
    options: bytes | None,
    *,
    skip_sections: bool,
) -> None:
    for event in base.events:
        tag = parse_tag(event.data) if event.event_type == EventType.EV_EVENT_TAG else None
        if event.number in replaced:
            making.add(event.register, event.event_type, replaced[event.number], event.data)
        elif tag is not None and tag[0] == LINUX_INITRD and initrd is not None:
            making.add(event.register, event.event_type, making.hash(initrd), event.data)
        elif tag is not None and tag[0] == LINUX_LOAD_OPTIONS and options is not None:
            making.add(event.register, event.event_type, making.hash(options), event.data)
        elif not (skip_sections and event.register == PCR_UKI and _is_section(event)):
            making.keep(event)
