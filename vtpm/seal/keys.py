"""Data keys and the providers that wrap them with a key-encryption key."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, Protocol

from vtpm.errors import ConfigError

DATA_KEY_SIZE: Final = 32
ENTRY_POINT_GROUP: Final = "vtpm.key_providers"


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A data key as the store keeps it: encrypted by `provider` under its key `key_id`."""

    provider: str
    key_id: str
    blob: bytes = field(repr=False)


def new_data_key() -> bytes:
    """Return a fresh data key of 32 bytes."""
    return os.urandom(DATA_KEY_SIZE)


class KeyProvider(Protocol):
    """Wraps data keys. Calls may block; any of them may raise KeyProviderError, `unwrap` also SealedStateError."""

    @property
    def name(self) -> str:
        """The provider's entry point name, kept with each wrapped key."""

    @property
    def key_id(self) -> str:
        """Id of the key-encryption key that wraps new data keys."""

    @property
    def immediate(self) -> bool:
        """Whether `unwrap` asks nobody, so that it never blocks."""

    def wrap(self, data_key: bytes, instance: uuid.UUID) -> WrappedKey:
        """Encrypt `data_key` under the current key, bound to `instance`."""

    def unwrap(self, wrapped: WrappedKey, instance: uuid.UUID) -> bytes:
        """Return the data key."""

    def remembered(self) -> frozenset[str]:
        """Return the marks that were given to `remember`; kept where who can write the store can't write."""

    def remember(self, mark: str) -> None:
        """Keep a mark durably, for good: it says that a store's rows carry MACs, and under which key (vtpm.store.row_key)."""

    def begin_rotation(self) -> str:
        """Add a key durably and make it the current one; return its id. The earlier ones still unwrap.

        After an interrupted rotation the key that it added is used again.
        """

    def finish_rotation(self) -> None:
        """Destroy every key but the current one."""


def load_key_provider(name: str, *, state_dir: Path, options: Mapping[str, str], create: bool) -> KeyProvider:
    """Return the installed provider called `name`, set up with `options`.

    `create` says that a provider may make a key where there is none: only true while nothing is sealed yet.

    Raises:
        ConfigError: KEY_PROVIDER_UNKNOWN.
        KeyProviderError: the provider can't be used; its reason says why.
    """
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        raise ConfigError(
            "KEY_PROVIDER_UNKNOWN",
            f"there is no key provider {name!r}; installed: {', '.join(sorted(found)) or 'none'}",
            subject="key_provider",
            remedy="set key_provider to an installed one",
        )
    provider: KeyProvider = found[name].load()(state_dir=state_dir, options=options, create=create)
    return provider
