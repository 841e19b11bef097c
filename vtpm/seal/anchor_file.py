"""The `file` anchor: one file, best on another volume than the store's.

Whoever can write the store and not this file can't put an older store back unnoticed. Whoever can write both can put both back.
"""

from __future__ import annotations

import errno
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Final

from vtpm import files
from vtpm.crashpoints import crash_point
from vtpm.errors import AnchorError, SealedStateError, VtpmError
from vtpm.seal.anchor import MAX_ANCHOR_SIZE, AnchorContent, AnchorKeys, damaged, dump, header_of, parse
from vtpm.seal.keys import KeyProvider

_SPACING_S: Final = 1.0


class FileAnchor:
    """Implements vtpm.seal.anchor.Anchor."""

    name = "file"
    spacing_s = _SPACING_S

    def __init__(self, provider: KeyProvider, path: Path) -> None:
        self._provider = provider
        self._path = path
        self._keys: AnchorKeys | None = None

    @property
    def subject(self) -> str:
        """See Anchor."""
        return str(self._path)

    @property
    def keys(self) -> AnchorKeys:
        """See Anchor."""
        assert self._keys is not None, "read or created first"
        return self._keys

    def read(self) -> AnchorContent | None:
        """See Anchor.

        Raises:
            AnchorError: ANCHOR_DAMAGED, ANCHOR_FORMAT_UNKNOWN, ANCHOR_KEY_UNUSABLE or ANCHOR_UNREADABLE.
        """
        data = read_bounded(self._path)
        return None if data is None else self._open(data)

    def _open(self, data: bytes) -> AnchorContent:
        store, wrapped = header_of(data, self.subject)
        try:
            keys = AnchorKeys(self._provider, store, wrapped)
        except SealedStateError:
            raise damaged(self.subject, "was changed, or is damaged") from None
        except VtpmError as error:
            raise AnchorError(
                "ANCHOR_KEY_UNUSABLE",
                f"the anchor's key can't be had: {error.reason}: {error.message}",
                subject=self.subject,
                remedy=error.remedy,
            ) from None
        content = parse(data, keys, self.subject)
        self._keys = keys
        return content

    def create(self, store: uuid.UUID) -> AnchorContent:
        """See Anchor."""
        self._keys = AnchorKeys(self._provider, store)
        return AnchorContent(store)

    def write(self, content: AnchorContent) -> AnchorContent:
        """See Anchor.

        Raises:
            AnchorError: ANCHOR_UNWRITABLE.
        """
        content = replace(content, update=content.update + 1, time_s=int(time.time()))
        put(self._path, dump(content, self.keys))
        return content


def read_bounded(path: Path) -> bytes | None:
    """Return the content of a regular file; None if there is no file where there is a directory for it.

    Raises:
        AnchorError: ANCHOR_UNREADABLE, ANCHOR_NOT_TRUSTED or ANCHOR_DAMAGED.
    """
    try:
        data = files.read(path, MAX_ANCHOR_SIZE, trusted=True, owned=True)
    except FileNotFoundError:
        if path.parent.is_dir():
            return None
        raise _unreadable(path, "its directory does not exist") from None
    except files.UnsafePathError as error:
        raise _not_trusted(path, error) from None
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise damaged(str(path), f"has more than {MAX_ANCHOR_SIZE} bytes") from None
        raise _unreadable(path, error.strerror) from None
    return data


def _unreadable(path: Path, why: str | None) -> AnchorError:
    return AnchorError(
        "ANCHOR_UNREADABLE",
        f"the anchor can't be read: {why}",
        subject=str(path),
        remedy="see that its volume is mounted and readable for the daemon; it is tried again",
    )


def _not_trusted(path: Path, error: files.UnsafePathError) -> AnchorError:
    return AnchorError(
        "ANCHOR_NOT_TRUSTED",
        f"somebody else could put another anchor there: {error.strerror}",
        subject=str(path),
        remedy=error.remedy,
    )


def put(path: Path, data: bytes) -> None:
    """Replace a file as one step, durably.

    Raises:
        AnchorError: ANCHOR_UNWRITABLE or ANCHOR_NOT_TRUSTED.
    """
    try:
        files.replace(
            path, data, trusted=True, temporary=f".{path.name}.new", before=lambda: crash_point("anchor.before_rename")
        )
    except files.UnsafePathError as error:
        raise _not_trusted(path, error) from None
    except OSError as error:
        raise AnchorError(
            "ANCHOR_UNWRITABLE",
            f"the anchor can't be written: {error.strerror}",
            subject=str(path),
            remedy="check its directory and free space; it is tried again",
        ) from None
    crash_point("anchor.after_rename")
