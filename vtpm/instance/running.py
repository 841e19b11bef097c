"""An instance that is ON, as the daemon holds it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from vtpm.instance.wakeful import WakefulTpm
from vtpm.store.model import InstanceRecord


@dataclass(slots=True)
class Running:
    """A powered-on instance, awake or hibernated.

    `untouched`: the engine host says that no worker has gone on from its snapshot, whatever an earlier daemon has marked.
    `busy_with` are the kinds of background work that is under way for it, and whether it is to be done once more after that.
    """

    record: InstanceRecord
    tpm: WakefulTpm
    untouched: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    busy_with: dict[str, bool] = field(default_factory=dict)
