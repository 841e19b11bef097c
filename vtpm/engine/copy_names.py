"""The names that copies of a hibernated instance's descriptors have in the service manager's store.

    vtpm1.INSTANCE.EPOCH.VERSION.COUNT.ROLE.ZEROS

INSTANCE is the id's 16 bytes in base64url, VERSION the snapshot's, COUNT how many descriptors the instance has; ROLE and ZEROS
are those of the link's ParkedInstance. Short, as the service manager passes all names in one environment variable, which the
kernel limits to 128 KiB. What comes back may not be what was given: it may be outdated, or incomplete.
"""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from vtpm.engine.v1 import link_pb2 as pb

PREFIX: Final = "vtpm1."
_NAME: Final = re.compile(r"vtpm1\.([A-Za-z0-9_-]{22})\.(\d{1,20})\.(\d{1,20})\.(\d{1,3})\.(\d{1,2})\.(\d{1,10})", re.ASCII)


@dataclass(frozen=True, slots=True)
class CopyName:
    """Whose a descriptor is, and of which snapshot."""

    instance: uuid.UUID
    epoch: int
    version: int
    count: int
    role: int
    zeros: int

    def __str__(self) -> str:
        instance = base64.urlsafe_b64encode(self.instance.bytes).rstrip(b"=").decode()
        return f"{PREFIX}{instance}.{self.epoch}.{self.version}.{self.count}.{self.role}.{self.zeros}"

    @classmethod
    def parse(cls, text: str) -> CopyName | None:
        """Return what a name says; None if it is none."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        instance = uuid.UUID(bytes=base64.urlsafe_b64decode(match[1] + "=="))
        name = cls(instance, *(int(number) for number in match.groups()[1:]))
        known = name.role in pb.Role.values() and name.count > 0 and name.version and max(name.epoch, name.version) < 1 << 64
        # A name has one spelling, by which it is removed.
        return name if known and name.zeros < 1 << 32 and str(name) == text else None


@dataclass(slots=True)
class Group:
    """Descriptors that came back under names that belong together."""

    about: pb.ParkedInstance
    count: int
    names: list[str] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether no descriptor is missing."""
        return len(self.fds) == self.count


def names_of(about: pb.ParkedInstance) -> list[str]:
    """Return the name of each of an instance's descriptors; those of the same role may have the same."""
    instance, zeros = uuid.UUID(about.instance), list(about.zeros) or [0] * len(about.roles)
    return [
        str(CopyName(instance, about.epoch, about.snapshot_version, len(about.roles), role, zero))
        for role, zero in zip(about.roles, zeros, strict=True)
    ]


def grouped(stored: Iterable[tuple[str, int]], engine: str) -> tuple[list[Group], Sequence[tuple[str, int]]]:
    """Sort names with their descriptors into instances; also return what has no name of ours."""
    groups: dict[tuple[uuid.UUID, int, int, int], Group] = {}
    others = []
    for text, fd in stored:
        name = CopyName.parse(text)
        if name is None:
            others.append((text, fd))
            continue
        key = name.instance, name.epoch, name.version, name.count
        if key not in groups:
            about = pb.ParkedInstance(
                instance=str(name.instance), epoch=name.epoch, engine=engine, snapshot_version=name.version
            )
            groups[key] = Group(about, name.count)
        group = groups[key]
        group.names.append(text)
        group.fds.append(fd)
        group.about.roles.append(name.role)  # type: ignore[arg-type]  # it is one of them, `parse` says
        group.about.zeros.append(name.zeros)
    return list(groups.values()), others
