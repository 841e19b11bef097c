"""Makes the anchor that the settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol

import structlog

from vtpm.instance.freshness import Freshness
from vtpm.seal.anchor import Anchor
from vtpm.seal.anchor_file import FileAnchor
from vtpm.seal.anchor_tpm2 import Tpm2Anchor
from vtpm.seal.keys import KeyProvider
from vtpm.store.store import Store

log: Final = structlog.get_logger("vtpm.freshness")

_FILE_INTERVAL_S: Final = 10.0
_TPM2_INTERVAL_S: Final = 600.0
_FILE_NAME: Final = "anchor"


class AnchorSettings(Protocol):
    """What this reads of vtpm.config.Settings."""

    @property
    def state_dir(self) -> Path:
        """Where the store is."""

    @property
    def anchor(self) -> str:
        """`none`, `file` or `tpm2`."""

    @property
    def anchor_path(self) -> str:
        """The file; empty for the default."""

    @property
    def anchor_interval_s(self) -> float:
        """0 for the default."""

    @property
    def anchor_tcti(self) -> str:
        """TCTI of the host's TPM."""

    @property
    def anchor_nv_index(self) -> int:
        """First of the two NV indices."""


def open_freshness(settings: AnchorSettings, store: Store, keys: KeyProvider) -> Freshness:
    """Return rollback protection as the settings want it."""
    path = Path(settings.anchor_path) if settings.anchor_path else settings.state_dir / _FILE_NAME
    anchor: Anchor | None = None
    interval_s = settings.anchor_interval_s
    match settings.anchor:
        case "file":
            anchor = FileAnchor(keys, path)
            interval_s = interval_s or _FILE_INTERVAL_S
            if path.parent.is_dir() and path.parent.stat().st_dev == settings.state_dir.stat().st_dev:
                log.warning("anchor.same_volume", path=str(path), remedy="put it on another: see docs/rollback.md")
        case "tpm2":
            interval_s = interval_s or _TPM2_INTERVAL_S
            anchor = Tpm2Anchor(keys, path, tcti=settings.anchor_tcti, nv_index=settings.anchor_nv_index, spacing_s=interval_s)
    return Freshness(store, anchor, interval_s=interval_s or _FILE_INTERVAL_S)
