"""Event types by number, and what each one's digest is taken over (TCG PC Client Platform Firmware Profile 1.06, 10.4.1)."""

from __future__ import annotations

import enum
from typing import Final

from vtpm.eventlog.values import CEL_CONTENT, IMA_TEMPLATE, SYSTEMD_CONTENT


class EventType(enum.IntEnum):
    """TCG_EVENTTYPE."""

    EV_PREBOOT_CERT = 0x0
    EV_POST_CODE = 0x1
    EV_UNUSED = 0x2
    EV_NO_ACTION = 0x3
    EV_SEPARATOR = 0x4
    EV_ACTION = 0x5
    EV_EVENT_TAG = 0x6
    EV_S_CRTM_CONTENTS = 0x7
    EV_S_CRTM_VERSION = 0x8
    EV_CPU_MICROCODE = 0x9
    EV_PLATFORM_CONFIG_FLAGS = 0xA
    EV_TABLE_OF_DEVICES = 0xB
    EV_COMPACT_HASH = 0xC
    EV_IPL = 0xD
    EV_IPL_PARTITION_DATA = 0xE
    EV_NONHOST_CODE = 0xF
    EV_NONHOST_CONFIG = 0x10
    EV_NONHOST_INFO = 0x11
    EV_OMIT_BOOT_DEVICE_EVENTS = 0x12
    EV_POST_CODE2 = 0x13
    EV_EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
    EV_EFI_VARIABLE_BOOT = 0x80000002
    EV_EFI_BOOT_SERVICES_APPLICATION = 0x80000003
    EV_EFI_BOOT_SERVICES_DRIVER = 0x80000004
    EV_EFI_RUNTIME_SERVICES_DRIVER = 0x80000005
    EV_EFI_GPT_EVENT = 0x80000006
    EV_EFI_ACTION = 0x80000007
    EV_EFI_PLATFORM_FIRMWARE_BLOB = 0x80000008
    EV_EFI_HANDOFF_TABLES = 0x80000009
    EV_EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000000A
    EV_EFI_HANDOFF_TABLES2 = 0x8000000B
    EV_EFI_VARIABLE_BOOT2 = 0x8000000C
    EV_EFI_GPT_EVENT2 = 0x8000000D
    EV_EFI_HCRTM_EVENT = 0x80000010
    EV_EFI_VARIABLE_AUTHORITY = 0x800000E0
    EV_EFI_SPDM_FIRMWARE_BLOB = 0x800000E1
    EV_EFI_SPDM_FIRMWARE_CONFIG = 0x800000E2
    EV_EFI_SPDM_DEVICE_POLICY = 0x800000E3
    EV_EFI_SPDM_DEVICE_AUTHORITY = 0x800000E4


_OWN_NAMES: Final = {CEL_CONTENT: "CEL content", SYSTEMD_CONTENT: "systemd", IMA_TEMPLATE: "IMA template"}
_NAMES: Final = {int(item): item.name for item in EventType} | _OWN_NAMES

VARIABLES: Final = frozenset(
    {
        EventType.EV_EFI_VARIABLE_DRIVER_CONFIG,
        EventType.EV_EFI_VARIABLE_BOOT,
        EventType.EV_EFI_VARIABLE_BOOT2,
        EventType.EV_EFI_VARIABLE_AUTHORITY,
    }
)
IMAGES: Final = frozenset(
    {
        EventType.EV_EFI_BOOT_SERVICES_APPLICATION,
        EventType.EV_EFI_BOOT_SERVICES_DRIVER,
        EventType.EV_EFI_RUNTIME_SERVICES_DRIVER,
    }
)
# Events whose digest is the hash of their data. Of all others the digest is of something that the log does not hold: an
# image, a firmware volume, a file, a table in memory. EV_PLATFORM_CONFIG_FLAGS, EV_IPL and EV_EVENT_TAG are used for both.
DIGEST_IS_OF_DATA: Final = frozenset(
    {
        EventType.EV_SEPARATOR,
        EventType.EV_ACTION,
        EventType.EV_EFI_ACTION,
        EventType.EV_S_CRTM_VERSION,
        EventType.EV_OMIT_BOOT_DEVICE_EVENTS,
        EventType.EV_EFI_GPT_EVENT,
        EventType.EV_EFI_VARIABLE_DRIVER_CONFIG,
        EventType.EV_EFI_VARIABLE_BOOT,
        EventType.EV_EFI_VARIABLE_BOOT2,
        EventType.EV_EFI_VARIABLE_AUTHORITY,
    }
)
DIGEST_MAY_BE_OF_DATA: Final = frozenset(
    {
        EventType.EV_IPL,
        EventType.EV_EVENT_TAG,
        EventType.EV_PLATFORM_CONFIG_FLAGS,
        EventType.EV_COMPACT_HASH,
        EventType.EV_CPU_MICROCODE,
        EventType.EV_NONHOST_INFO,
        EventType.EV_S_CRTM_CONTENTS,
        EventType.EV_TABLE_OF_DEVICES,
        EventType.EV_EFI_HCRTM_EVENT,
    }
)


def type_name(event_type: int) -> str:
    """Return an event type's name, or its number where no name is known."""
    return _NAMES.get(event_type) or f"0x{event_type:08x}"


def is_known(event_type: int) -> bool:
    """Return whether a type has a name."""
    return event_type in _NAMES
