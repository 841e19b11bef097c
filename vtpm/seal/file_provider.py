"""The `file` key provider: key-encryption keys in one file that only the daemon's user can read.

Simple and honest: who can read the file and the store can open every sealed state. Its place may be another volume than the
store's (option `path`), so that neither alone is enough.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from vtpm import files
from vtpm.crashpoints import crash_point
from vtpm.errors import KeyProviderError, SealedStateError
from vtpm.seal.keys import DATA_KEY_SIZE, WrappedKey

PROVIDER_NAME: Final = "file"
_FILE_NAME: Final = "keys.json"
_FORMAT: Final = 1
_MAX_FILE_SIZE: Final = 64 << 10
_NONCE_SIZE: Final = 12


class FileKeyProvider:
    """Implements vtpm.seal.keys.KeyProvider. The file is made at first start, mode 0600, and read once.

    Raises:
        KeyProviderError: KEY_FILE_MISSING, KEY_FILE_MODE, KEY_FILE_OWNER, KEY_FILE_DAMAGED, KEY_FILE_FORMAT_UNKNOWN,
            KEY_FILE_NOT_TRUSTED or KEY_FILE_UNUSABLE, with the file as subject. Nothing is overwritten.
    """

    name = PROVIDER_NAME
    # The keys are in memory.
    immediate = True

    def __init__(self, *, state_dir: Path, options: Mapping[str, str], create: bool) -> None:
        unknown = set(options) - {"path"}
        if unknown:
            raise KeyProviderError(
                "KEY_PROVIDER_OPTION_UNKNOWN",
                f"the provider `file` has no option {sorted(unknown)[0]!r}",
                remedy="its option is path",
            )
        self._path = Path(options.get("path", "") or state_dir / _FILE_NAME)
        self._keys: dict[str, bytes] = {}
        self._marks: frozenset[str] = frozenset()
        self._current = ""
        if not os.path.lexists(self._path):
            if not create:
                # A new key here would open nothing, and hide why (invariant 7).
                raise self._error(
                    "KEY_FILE_MISSING",
                    "the key file is missing, and the store holds state sealed under it",
                    "put the file back from where it was kept; without it the sealed states can't be opened",
                )
            self._add_key()
        else:
            self._read()

    def __repr__(self) -> str:
        return f"FileKeyProvider({str(self._path)!r})"

    @property
    def key_id(self) -> str:
        """See KeyProvider."""
        return self._current

    def _error(self, reason: str, message: str, remedy: str) -> KeyProviderError:
        return KeyProviderError(reason, message, subject=str(self._path), remedy=remedy)

    def _not_trusted(self, error: files.UnsafePathError) -> KeyProviderError:
        return self._error(
            "KEY_FILE_NOT_TRUSTED", f"somebody else could put another key file there: {error.strerror}", error.remedy
        )

    # ---- the file --------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            fd = files.open_file(self._path, trusted=True)
        except files.UnsafePathError as error:
            raise self._not_trusted(error) from None
        except OSError as error:
            raise self._error(
                "KEY_FILE_UNUSABLE", f"the key file can't be read: {error.strerror}", "check what it is"
            ) from None
        status = os.fstat(fd)
        with open(fd, "rb") as file:  # noqa: PTH123  # by descriptor: what was checked is what is read
            if status.st_uid != os.geteuid():
                raise self._error(
                    "KEY_FILE_OWNER",
                    f"the key file belongs to uid {status.st_uid}, the daemon runs as {os.geteuid()}",
                    f"chown {os.geteuid()} '{self._path}'",
                )
            if status.st_mode & 0o077:
                raise self._error(
                    "KEY_FILE_MODE",
                    f"the key file has mode {stat.S_IMODE(status.st_mode):04o}: others may read it",
                    f"chmod 0600 '{self._path}', and rotate the key if others may have read it",
                )
            content = file.read(_MAX_FILE_SIZE + 1)
        self._parse(content)

    def _parse(self, content: bytes) -> None:
        damaged = self._error("KEY_FILE_DAMAGED", "the key file is damaged", "put the file back from where it was kept")
        if len(content) > _MAX_FILE_SIZE:
            raise damaged
        try:
            document: Any = json.loads(content)
            form = document["format"]
            if form != _FORMAT:
                raise self._error(
                    "KEY_FILE_FORMAT_UNKNOWN", f"the key file has format {form!r}", "start the vTPM version that wrote it"
                )
            keys = {str(key): base64.b64decode(value, validate=True) for key, value in document["keys"].items()}
            current = document["current"]
            # Files of earlier versions have none.
            marks = frozenset(map(str, document.get("rows", [])))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
            raise damaged from None
        if not isinstance(current, str) or current not in keys or any(len(key) != DATA_KEY_SIZE for key in keys.values()):
            raise damaged
        self._keys, self._current, self._marks = keys, current, marks

    def _write(self, keys: Mapping[str, bytes], current: str, marks: frozenset[str]) -> None:
        """Replace the file as one step, durably; only then does what is in it count."""
        encoded = {key: base64.b64encode(value).decode() for key, value in keys.items()}
        content = json.dumps({"format": _FORMAT, "current": current, "keys": encoded, "rows": sorted(marks)}).encode()
        try:
            files.replace(
                self._path,
                content,
                trusted=True,
                temporary=f".{self._path.name}.new",
                before=lambda: crash_point("keys.before_rename"),
            )
        except files.UnsafePathError as error:
            raise self._not_trusted(error) from None
        except OSError as error:
            raise self._error(
                "KEY_FILE_UNUSABLE", f"the key file can't be written: {error.strerror}", "check the directory and free space"
            ) from None
        self._keys, self._current, self._marks = dict(keys), current, marks

    def _add_key(self) -> None:
        key_id = f"file-{uuid.uuid4().hex[:16]}"
        self._write({**self._keys, key_id: os.urandom(DATA_KEY_SIZE)}, key_id, self._marks)

    # ---- which stores' rows carry MACs ---------------------------------------------------------------------------------------

    def remembered(self) -> frozenset[str]:
        """See KeyProvider."""
        return self._marks

    def remember(self, mark: str) -> None:
        """See KeyProvider."""
        self._write(self._keys, self._current, self._marks | {mark})

    # ---- wrapping --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _context(key_id: str, instance: uuid.UUID) -> bytes:
        return b"vtpm data key\0" + PROVIDER_NAME.encode() + b"\0" + key_id.encode() + b"\0" + instance.bytes

    def wrap(self, data_key: bytes, instance: uuid.UUID) -> WrappedKey:
        """See KeyProvider."""
        nonce = os.urandom(_NONCE_SIZE)
        sealed = AESGCMSIV(self._keys[self._current]).encrypt(nonce, data_key, self._context(self._current, instance))
        return WrappedKey(PROVIDER_NAME, self._current, nonce + sealed)

    def unwrap(self, wrapped: WrappedKey, instance: uuid.UUID) -> bytes:
        """See KeyProvider."""
        if wrapped.provider != PROVIDER_NAME:
            raise KeyProviderError(
                "KEY_PROVIDER_MISMATCH",
                f"the data key was wrapped by the provider {wrapped.provider!r}, configured is {PROVIDER_NAME!r}",
                subject=str(instance),
                remedy=f"set key_provider to {wrapped.provider}",
            )
        key = self._keys.get(wrapped.key_id)
        if key is None:
            raise self._error(
                "KEY_UNKNOWN",
                f"the data key of instance {instance} was wrapped under {wrapped.key_id}, which is not in the key file",
                "this is the wrong key file, or an older copy: put back the one that holds that key",
            )
        try:
            return AESGCMSIV(key).decrypt(
                wrapped.blob[:_NONCE_SIZE], wrapped.blob[_NONCE_SIZE:], self._context(wrapped.key_id, instance)
            )
        except (InvalidTag, ValueError):
            raise SealedStateError(
                "DATA_KEY_AUTHENTICATION_FAILED",
                "the wrapped data key is damaged or belongs to another instance",
                subject=str(instance),
                remedy="restore this instance: vtpm backup restore FILE --instance NAME; its present row is left as it is",
            ) from None

    # ---- rotation --------------------------------------------------------------------------------------------------------

    def begin_rotation(self) -> str:
        """See KeyProvider."""
        if len(self._keys) == 1:
            self._add_key()
        crash_point("rotate.after_begin")
        return self._current

    def finish_rotation(self) -> None:
        """See KeyProvider."""
        crash_point("rotate.before_finish")
        self._write({self._current: self._keys[self._current]}, self._current, self._marks)
