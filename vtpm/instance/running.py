"""An instance that is ON, as the daemon holds it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from vtpm.instance.wakeful import WakefulTpm
from vtpm.store.model import InstanceRecord


@dataclass(slots=True)
class Running:
    """A powered-on instance, awake or hibernated."""

    record: InstanceRecord
    tpm: WakefulTpm
    gone: asyncio.Event = field(default_factory=asyncio.Event)
