"""What a worker asks of the software TPM that it runs, and the engines' names."""

from __future__ import annotations

from typing import Final, Protocol

LIBTPMS: Final = "libtpms"
TPM_SERVER: Final = "tpm_server"
ENGINES: Final = (LIBTPMS, TPM_SERVER)


class Response(Protocol):
    """A response where the software TPM left it; the next command may overwrite it."""

    def __len__(self) -> int: ...

    def __buffer__(self, flags: int, /) -> memoryview: ...


class SoftwareTpm(Protocol):
    """The one TPM of a worker process. Every method raises EngineError when the TPM itself fails.

    `command` is where a command is put before `process_in_place`. `permanent` holds the permanent state as the TPM last stored
    it; `dirty` says that it changed since the owner of this object last cleared the flag.
    """

    command: bytearray
    permanent: bytes | None
    dirty: bool
    locality: int

    @property
    def control_capabilities(self) -> int:
        """What its VM's control channel may promise (PTM_CAP_…)."""

    @property
    def lifeline(self) -> int:
        """A descriptor that is readable once the TPM's program has ended; -1 for a TPM without one."""

    def manufacture(self) -> None:
        """Make a fresh TPM with seeds of its own making and power it on."""

    def power_on(self, permanent: bytes, volatile: bytes | None = None) -> None:
        """Power on (_TPM_Init) with this permanent state, going on from `volatile`; never makes another (invariant 7)."""

    def power_off(self) -> None:
        """Drop volatile state; the permanent state stays in `permanent`."""

    def forget(self) -> None:
        """Power off and forget the state."""

    def process_in_place(self, size: int) -> Response:
        """Run the `size` bytes in `command`; return the response, valid until the next call."""

    def process(self, command: bytes) -> bytes:
        """Run one command of at most 4096 bytes; return the response."""

    # ---- what the platform around a TPM does; a TPM that can't raises EngineError --------------------------------------------

    def volatile(self) -> bytes:
        """The volatile state."""

    def check_permanent(self, state: bytes) -> None:
        """Raise EngineError if this can't be a permanent state; the TPM is off."""

    def check_volatile(self, state: bytes, permanent: bytes) -> None:
        """Raise EngineError if this can't be a volatile state of a TPM with that permanent state; the TPM is off."""

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """Set the largest command (0: leave it); return it with its least and greatest."""

    def info(self, flags: int) -> bytes:
        """What the TPM tells of itself, as JSON."""

    def hash_start(self) -> int:
        """_TPM_Hash_Start; a TPM_RESULT."""

    def hash_data(self, data: bytes) -> int:
        """_TPM_Hash_Data; a TPM_RESULT."""

    def hash_end(self) -> int:
        """_TPM_Hash_End; a TPM_RESULT."""

    def established(self) -> bool:
        """The TPM established flag."""

    def reset_established(self) -> int:
        """Clear that flag, if the locality may; a TPM_RESULT."""
