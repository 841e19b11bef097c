"""The `tpm2` anchor: what a file says counts only if the host's TPM has seen exactly that as the last.

Two NV indices (TPM 2.0 Library, Part 1, 37.2): one of type EXTEND, into which the digest of each content goes, and a COUNTER,
which says by how much a file is behind. The content names the value that the EXTEND index had before it, so one file
alone fits the TPM's present value; an older file with an older store does not.

Order of a write: the new file beside the old one, TPM2_NV_Extend, TPM2_NV_Increment, then the new file in the place of the old
one. A crash between any two leaves one file that fits.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from vtpm.crashpoints import crash_point
from vtpm.errors import AnchorError
from vtpm.seal.anchor import DIGEST_SIZE, NO_DIGEST, RESET_REMEDY, AnchorContent, AnchorKeys, dump
from vtpm.seal.anchor_file import FileAnchor, put, read_bounded
from vtpm.seal.keys import KeyProvider

_COUNTER_SIZE: Final = 8
# Value of the EXTEND index before this content, value of the counter with it.
_BINDING: Final = struct.Struct(">32sQ")
# TPM_RC_HANDLE for the first handle: no such index (Part 2, 6.6.3).
_RC_NO_HANDLE: Final = 0x18B
# TPM_RC_NV_UNINITIALIZED: defined and not yet written.
_RC_UNINITIALIZED: Final = 0x14A
_RC_AUTH: Final = (0x98E, 0x9A2, 0x98B)


class Tpm2Anchor(FileAnchor):
    """Implements vtpm.seal.anchor.Anchor over `path` and the TPM at `tcti` (tcti-ldr's form, such as `device:/dev/tpmrm0`).

    `nv_index` is the EXTEND index; the counter is the next one. Made with owner authorization and an empty owner auth, each
    with an auth value derived from the anchor's secret. `spacing_s` is the interval: NV of a hardware TPM wears out.
    """

    name = "tpm2"

    def __init__(self, provider: KeyProvider, path: Path, *, tcti: str, nv_index: int, spacing_s: float) -> None:
        super().__init__(provider, path)
        self._tcti = tcti
        self._nv_index = nv_index
        self.spacing_s = spacing_s
        self._next = path.with_name(f"{path.name}.next")
        self._new = False

    @property
    def subject(self) -> str:
        """See Anchor."""
        return f"{self._tcti}, NV index 0x{self._nv_index:08x}, with {self._path}"

    # ---- what Anchor asks for --------------------------------------------------------------------------------------------

    def read(self) -> AnchorContent | None:
        """See Anchor.

        Raises:
            AnchorError: as FileAnchor.read; ANCHOR_STALE, the file is older than what the TPM has seen; ANCHOR_TPM_FAILED.
        """
        files = [(path, data) for path in (self._path, self._next) if (data := read_bounded(path)) is not None]
        with self._tpm() as tpm:
            if not files:
                if tpm.defined():
                    raise AnchorError(
                        "ANCHOR_MISSING",
                        "the TPM has an anchor, and its file is gone",
                        subject=self.subject,
                        remedy=RESET_REMEDY,
                    )
                return None
            if not tpm.defined():
                raise AnchorError(
                    "ANCHOR_FOREIGN",
                    "this TPM has no anchor, and there is a file for one: another TPM, or a cleared one",
                    subject=self.subject,
                    remedy=RESET_REMEDY,
                )
            return self._choose(files, tpm)

    def _choose(self, files: list[tuple[Path, bytes]], tpm: _NvPair) -> AnchorContent:
        trouble: AnchorError | None = None
        for path, data in files:
            try:
                content = self._open(data)
            except AnchorError as error:
                trouble = trouble or error
                continue
            extended, counter = tpm.values(self.keys)
            before, wanted = _BINDING.unpack(content.binding) if len(content.binding) == _BINDING.size else (NO_DIGEST, 0)
            if sha256(before + sha256(data).digest()).digest() == extended and counter in (wanted, wanted - 1):
                if counter < wanted:
                    tpm.increment(self.keys)
                if path == self._next:
                    put(self._path, data)
                self._next.unlink(missing_ok=True)
                return content
            trouble = trouble or AnchorError(
                "ANCHOR_STALE",
                f"the anchor's file is of update {wanted}, the TPM has seen {counter}",
                subject=self.subject,
                remedy=RESET_REMEDY,
            )
        assert trouble is not None
        raise trouble

    def create(self, store: uuid.UUID) -> AnchorContent:
        """See Anchor."""
        content = super().create(store)
        self._new = True
        return content

    def write(self, content: AnchorContent) -> AnchorContent:
        """See Anchor.

        Raises:
            AnchorError: ANCHOR_UNWRITABLE or ANCHOR_TPM_FAILED.
        """
        with self._tpm() as tpm:
            if self._new:
                self._path.unlink(missing_ok=True)
                self._next.unlink(missing_ok=True)
                tpm.define(self.keys)
                self._new = False
            before, counter = tpm.values(self.keys)
            content = replace(
                content, update=content.update + 1, time_s=int(time.time()), binding=_BINDING.pack(before, counter + 1)
            )
            data = dump(content, self.keys)
            put(self._next, data)
            crash_point("anchor.before_extend")
            tpm.extend(self.keys, sha256(data).digest())
            crash_point("anchor.before_increment")
            tpm.increment(self.keys)
            crash_point("anchor.after_increment")
        put(self._path, data)
        self._next.unlink(missing_ok=True)
        return content

    @contextlib.contextmanager
    def _tpm(self) -> Iterator[_NvPair]:
        # What its C library would write to standard error is in the exception.
        os.environ.setdefault("TSS2_LOG", "all+none")
        # Imported here, as it takes its time and nobody else in the daemon needs it.
        from tpm2_pytss import ESAPI, TSS2_Exception

        try:
            with ESAPI(self._tcti) as esys:
                yield _NvPair(esys, self._nv_index)
        except TSS2_Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Any) -> AnchorError:
        # The text of an exception of tpm2-pytss names the layer and the code; there is no secret in it.
        remedy = "see that the TPM is there and that the daemon may use it; it is tried again"
        if int(error.rc) & 0xFFF in _RC_AUTH:
            remedy = f"the NV index is another's: choose another anchor_nv_index, or {RESET_REMEDY}"
        return AnchorError("ANCHOR_TPM_FAILED", f"the host's TPM failed: {error}", subject=self.subject, remedy=remedy)


class _NvPair:
    """The two NV indices, through an open ESAPI connection; every use of them is in an HMAC session."""

    def __init__(self, esys: Any, nv_index: int) -> None:
        self._esys = esys
        self._index = nv_index

    def _handle(self, offset: int) -> Any:
        """The ESYS_TR of an index, None where there is none."""
        from tpm2_pytss import TSS2_Exception

        try:
            return self._esys.tr_from_tpmpublic(self._index + offset)
        except TSS2_Exception as error:
            if int(error.rc) & 0xFFF == _RC_NO_HANDLE:
                return None
            raise

    def defined(self) -> bool:
        """Whether one of them exists."""
        return self._handle(0) is not None or self._handle(1) is not None

    def define(self, keys: AnchorKeys) -> None:
        """Make both anew."""
        from tpm2_pytss import ESYS_TR, TPM2_ALG, TPM2_NT, TPM2B_NV_PUBLIC, TPMA_NV, TPMS_NV_PUBLIC

        for offset, kind, size in ((0, TPM2_NT.EXTEND, DIGEST_SIZE), (1, TPM2_NT.COUNTER, _COUNTER_SIZE)):
            if (old := self._handle(offset)) is not None:
                self._esys.nv_undefine_space(old, auth_handle=ESYS_TR.OWNER)
            attributes = TPMA_NV.AUTHREAD | TPMA_NV.AUTHWRITE | TPMA_NV.NO_DA | (kind << 4)
            public = TPMS_NV_PUBLIC(
                nvIndex=self._index + offset, nameAlg=TPM2_ALG.SHA256, attributes=TPMA_NV(attributes), dataSize=size
            )
            self._esys.nv_define_space(keys.nv_auth, TPM2B_NV_PUBLIC(nvPublic=public), auth_handle=ESYS_TR.OWNER)
        self.increment(keys)

    def values(self, keys: AnchorKeys) -> tuple[bytes, int]:
        """Return the value of the EXTEND index (NO_DIGEST while never extended) and that of the counter."""
        from tpm2_pytss import TSS2_Exception

        try:
            extended = self._read(keys, 0, DIGEST_SIZE)
        except TSS2_Exception as error:
            if int(error.rc) & 0xFFF != _RC_UNINITIALIZED:
                raise
            extended = NO_DIGEST
        return extended, int.from_bytes(self._read(keys, 1, _COUNTER_SIZE), "big")

    def _read(self, keys: AnchorKeys, offset: int, size: int) -> bytes:
        with self._session() as session:
            handle = self._known(keys, offset)
            return bytes(self._esys.nv_read(handle, size, auth_handle=handle, session1=session))

    def extend(self, keys: AnchorKeys, digest: bytes) -> None:
        """TPM2_NV_Extend."""
        with self._session() as session:
            handle = self._known(keys, 0)
            self._esys.nv_extend(handle, digest, auth_handle=handle, session1=session)

    def increment(self, keys: AnchorKeys) -> None:
        """TPM2_NV_Increment."""
        with self._session() as session:
            handle = self._known(keys, 1)
            self._esys.nv_increment(handle, auth_handle=handle, session1=session)

    def _known(self, keys: AnchorKeys, offset: int) -> Any:
        handle = self._esys.tr_from_tpmpublic(self._index + offset)
        self._esys.tr_set_auth(handle, keys.nv_auth)
        return handle

    @contextlib.contextmanager
    def _session(self) -> Iterator[Any]:
        # With an HMAC session the auth value does not pass, and an answer that did not come from the TPM is refused.
        from tpm2_pytss import ESYS_TR, TPM2_ALG, TPM2_SE

        session = self._esys.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.HMAC, None, TPM2_ALG.SHA256)
        try:
            yield session
        finally:
            self._esys.flush_context(session)
