"""libtpms bound with cffi: the software TPM of this process (`man 3 TPMLIB_Process`).

libtpms keeps its TPM in global variables, so there is one per process, and this module's state is global with it. All FFI of
the engine is in this file. Memory: buffers that libtpms allocates come from its TPM_Malloc and go back through TPM_Free;
states that it is given come from malloc.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from vtpm.engine.exits import last_words
from vtpm.engine.libtpms_abi import ffi
from vtpm.engine.randomness import CHECKSUM_SIZE, freshen
from vtpm.errors import EngineError
from vtpm.tpm.codes import response_code_name
from vtpm.tpm.command import MAX_COMMAND_SIZE
from vtpm.tpm.ptm import CAPABILITIES
from vtpm.tpm.service import response_code, stir_random_command

if TYPE_CHECKING:
    from vtpm.engine.software import Response

_ffi: Final[Any] = ffi
_buffer: Final[Any] = _ffi.buffer
_TPM_SUCCESS: Final = 0
_TPM_FAIL: Final = 9
_TPM_RETRY: Final = 0x800
_TPM_VERSION_2: Final = 1
_PERMANENT: Final = b"permall"
_VOLATILE: Final = b"volatilestate"
_MAX_STATE_SIZE: Final = 4 << 20
_STATE_PERMANENT: Final = 1
_STATE_VOLATILE: Final = 2
_INFO_FLAGS: Final = 7
_STIR_SIZE: Final = 32
_RC_SUCCESS: Final = 0
_RC_INITIALIZE: Final = 0x100
_RC_FAILURE: Final = 0x101
_OPENSSL_INIT_LOAD_CONFIG: Final = 0x40
_libc: Final[Any] = _ffi.dlopen(None)


def _on_error(kind: type[BaseException], _error: BaseException, _traceback: object) -> None:
    """Say that a callback failed. cffi would print a traceback, which needs the source files, and a worker has no files."""
    last_words(f"libtpms' callback failed: {kind.__name__}")


class Libtpms:
    """The TPM of this process. Make one; `power_on` before `process`.

    `permanent` holds the permanent state as libtpms last stored it; `dirty` says that it changed since the owner of this
    object last cleared the flag.
    """

    # libtpms is in this process and ends with it.
    lifeline: Final = -1
    control_capabilities: Final = CAPABILITIES

    def __init__(self, library: str = "libtpms.so.0") -> None:
        try:
            self._lib: Any = _ffi.dlopen(library)
        except OSError as error:
            raise EngineError(
                "LIBTPMS_MISSING", f"the software TPM library {library} can't be loaded", remedy="apt-get install libtpms0"
            ) from error
        self._locality = 0
        self.permanent: bytes | None = None
        self.dirty = False
        self._volatile: bytes | None = None
        self._manufacturing = False
        self._on = False
        # Whether libtpms may hold a state of its own that it prefers (check_permanent, check_volatile).
        self._holds_state = self._holds_volatile = False
        self._response = _ffi.new("unsigned char **")
        self._response_size = _ffi.new("uint32_t *")
        self._buffer_size = _ffi.new("uint32_t *")
        # One command buffer for the life of the process: a guest's command is received straight into it.
        self.command = bytearray(MAX_COMMAND_SIZE)
        self._command: Any = _ffi.from_buffer(self.command)
        self._process: Any = self._lib.TPMLIB_Process
        self._prepare_openssl()
        self._register()

    @property
    def version(self) -> str:
        """libtpms' version, such as `0.9.2`."""
        number = int(self._lib.TPMLIB_GetVersion())
        return f"{number >> 16}.{number >> 8 & 0xFF}.{number & 0xFF}"

    def _prepare_openssl(self) -> None:
        """Have OpenSSL read its configuration now: later, in a worker, there are no files to be read."""
        try:
            # libcrypto's; the dynamic linker finds it among what libtpms needs.
            prepare = self._lib.OPENSSL_init_crypto
        except AttributeError:
            # A libtpms with another library for its cryptography.
            return
        if prepare(_OPENSSL_INIT_LOAD_CONFIG, _ffi.NULL) != 1:
            raise EngineError(
                "LIBTPMS_FAILED", "OpenSSL can't be initialised", remedy="check OpenSSL's configuration: openssl version -d"
            )

    def _register(self) -> None:
        signatures = _ffi.typeof("struct libtpms_callbacks").fields
        handlers = {name: getattr(self, f"_{name}") for name, _ in signatures if name != "sizeOfStruct"}
        # An exception in a handler must never look like "no state yet": libtpms would manufacture a fresh TPM (invariant 7).
        self._callbacks = {
            name: _ffi.callback(field.type, handlers[name], error=_TPM_FAIL, onerror=_on_error)
            for name, field in signatures
            if name != "sizeOfStruct"
        }
        table = _ffi.new("struct libtpms_callbacks *", {"sizeOfStruct": _ffi.sizeof("struct libtpms_callbacks")})
        for name, callback in self._callbacks.items():
            setattr(table, name, callback)
        self._with_locality = table
        # Without this callback libtpms takes locality 0, and saves a way into Python with each command.
        self._at_locality_0 = _ffi.new("struct libtpms_callbacks *", table[0])
        self._at_locality_0.tpm_io_getlocality = _ffi.NULL
        self._check(self._lib.TPMLIB_ChooseTPMVersion(_TPM_VERSION_2), "TPMLIB_ChooseTPMVersion")
        self._check(self._lib.TPMLIB_RegisterCallbacks(self._at_locality_0), "TPMLIB_RegisterCallbacks")

    @property
    def locality(self) -> int:
        """The locality of the commands to come, 0 to 4."""
        return self._locality

    @locality.setter
    def locality(self, value: int) -> None:
        if value != self._locality:
            self._locality = value
            # libtpms copies the table, at any time.
            table = self._with_locality if value else self._at_locality_0
            self._check(self._lib.TPMLIB_RegisterCallbacks(table), "TPMLIB_RegisterCallbacks")

    @staticmethod
    def _check(result: int, function: str) -> None:
        if result != _TPM_SUCCESS:
            raise EngineError("LIBTPMS_FAILED", f"{function} failed with TPM_RESULT 0x{result:x}")

    # ---- callbacks; the data pointers are libtpms' and valid during the call only ----------------------------------------

    def _tpm_nvram_init(self) -> int:
        return _TPM_SUCCESS

    def _tpm_io_init(self) -> int:
        return _TPM_SUCCESS

    def _tpm_nvram_loaddata(self, data: Any, length: Any, _number: int, name: Any) -> int:
        match _ffi.string(name):
            case bytes(key) if key == _PERMANENT:
                if self.permanent is None:
                    # The one place where "no state yet" is the truth: a manufacture that was asked for (invariant 7).
                    return _TPM_RETRY if self._manufacturing else _TPM_FAIL
                state = self.permanent
            case bytes(key) if key == _VOLATILE:
                if self._volatile is None:
                    return _TPM_RETRY
                state = self._volatile
            case _:
                return _TPM_RETRY
        # libtpms frees this buffer itself, by free. Its own allocator gives less than the state of a TPM whose NV is full.
        data[0] = _ffi.cast("unsigned char *", _libc.malloc(len(state)))
        if data[0] == _ffi.NULL:
            return _TPM_FAIL
        _ffi.memmove(data[0], state, len(state))
        length[0] = len(state)
        return _TPM_SUCCESS

    def _tpm_nvram_storedata(self, data: Any, length: int, _number: int, name: Any) -> int:
        if _ffi.string(name) == _PERMANENT:
            if length > _MAX_STATE_SIZE:
                return _TPM_FAIL
            self.permanent = bytes(_ffi.buffer(data, length))
            self.dirty = True
        return _TPM_SUCCESS

    def _tpm_nvram_deletename(self, _number: int, name: Any, _must_exist: int) -> int:
        # The permanent state goes only with its instance.
        return _TPM_FAIL if _ffi.string(name) == _PERMANENT else _TPM_SUCCESS

    def _tpm_io_getlocality(self, locality: Any, _number: int) -> int:
        locality[0] = self._locality
        return _TPM_SUCCESS

    def _tpm_io_getphysicalpresence(self, presence: Any, _number: int) -> int:
        presence[0] = 0
        return _TPM_SUCCESS

    # ---- life ------------------------------------------------------------------------------------------------------------

    def manufacture(self) -> None:
        """Make a fresh TPM with seeds of its own making and power it on (TPM_Manufacture, _TPM_Init).

        Raises:
            EngineError: this process already has a TPM, or libtpms failed.
        """
        if self.permanent is not None or self._on:
            raise EngineError("TPM_EXISTS", "this process already has a TPM")
        self._manufacturing = True
        try:
            self._check(self._lib.TPMLIB_MainInit(), "TPMLIB_MainInit")
        finally:
            self._manufacturing = False
        if self.permanent is None:
            raise EngineError("MANUFACTURE_INCOMPLETE", "libtpms made a TPM but stored no state")
        self._on = True

    def power_on(self, permanent: bytes, volatile: bytes | None = None) -> None:
        """Power on (_TPM_Init) with the given permanent state, going on from `volatile` if given.

        Every load of a volatile state is here, so here it gets random numbers of its own (vtpm.engine.randomness). A permanent
        state needs nothing: libtpms reseeds in TPM2_Startup.

        Raises:
            EngineError: libtpms refuses the state; nothing was made in its place.
        """
        if self._on:
            self.power_off()
        if volatile is not None and len(volatile) <= CHECKSUM_SIZE:
            # libtpms would say nothing and start the TPM anew (invariant 7).
            raise EngineError(
                "VOLATILE_STATE_CUT",
                f"a volatile state of {len(volatile)} bytes is none",
                remedy="reset the instance together with its VM",
            )
        fresh = freshen(volatile, os.urandom) if volatile is not None else None
        self.permanent, self._volatile = permanent, volatile if fresh is None else fresh
        try:
            if self._holds_state:
                self._check(self._lib.TPMLIB_SetState(_STATE_PERMANENT, permanent, len(permanent)), "TPMLIB_SetState")
            if self._holds_volatile:
                # What it took to check the state is not what it goes on from, which has random numbers of its own.
                given = self._volatile
                state = _ffi.NULL if given is None else given
                self._check(self._lib.TPMLIB_SetState(_STATE_VOLATILE, state, len(given or b"")), "TPMLIB_SetState")
            # Should this fail, nobody knows what libtpms holds.
            self._holds_state = True
            self._check(self._lib.TPMLIB_MainInit(), "TPMLIB_MainInit")
            self._holds_state = self._holds_volatile = False
            if volatile is not None and fresh is None:
                self._stir()
        except EngineError:
            # It counts as initialised, and would take no state.
            self._lib.TPMLIB_Terminate()
            raise
        finally:
            self._volatile = None
        self._on = True

    def _stir(self) -> None:
        """Stir fresh entropy into a TPM whose volatile state is laid out in a way that is not known here.

        The guest can see that a command ran, which is less than to give two guests the same random numbers.
        """
        command = stir_random_command(os.urandom(_STIR_SIZE))
        # Not in `command`, where half of a guest's may be.
        buffer = _ffi.new("unsigned char[]", command)
        result = self._process(self._response, self._response_size, self._buffer_size, buffer, len(command))
        self._check(result, "TPMLIB_Process")
        code = response_code(bytes(_buffer(self._response[0], self._response_size[0])))
        # Not started: TPM2_Startup reseeds. Failed: nothing random comes from it until the next TPM2_Startup.
        if code not in (_RC_SUCCESS, _RC_INITIALIZE, _RC_FAILURE):
            raise EngineError("STIR_REFUSED", f"TPM2_StirRandom failed with {response_code_name(code)}")

    def forget(self) -> None:
        """Power off and forget the state, so that this process can take another TPM."""
        self.power_off()
        self.permanent, self.dirty, self.locality = None, False, 0

    def power_off(self) -> None:
        """Drop volatile state; the permanent state stays in `permanent`."""
        if self._on:
            self._lib.TPMLIB_Terminate()
            self._on = False

    def process_in_place(self, size: int) -> Response:
        """Run the `size` bytes in `command`; return the response as a buffer that is valid until the next call."""
        response, response_size = self._response, self._response_size
        result = self._process(response, response_size, self._buffer_size, self._command, size)
        if result:
            self._check(result, "TPMLIB_Process")
        view: Response = _buffer(response[0], response_size[0])
        return view

    def process(self, command: bytes) -> bytes:
        """Run one command of at most 4096 bytes; return the response.

        Raises:
            EngineError: libtpms itself failed; a TPM_RC other than success is in the response.
        """
        self.command[: len(command)] = command
        return bytes(self.process_in_place(len(command)))

    # ---- platform --------------------------------------------------------------------------------------------------------

    def check_permanent(self, state: bytes) -> None:
        """Raise EngineError if libtpms could not take `state`; the TPM must be off (TPMLIB_SetState)."""
        # From now on libtpms prefers what it took here to what the callbacks give, until the next power on. To take it back
        # with NULL would mean "no state", and the next power on would manufacture a TPM (invariant 7).
        self._holds_state = True
        self._check(self._lib.TPMLIB_SetState(_STATE_PERMANENT, state, len(state)), "TPMLIB_SetState")

    def check_volatile(self, state: bytes, permanent: bytes) -> None:
        """Raise EngineError if libtpms could not take `state` beside `permanent`; the TPM must be off (TPMLIB_SetState)."""
        # It looks at a volatile state only where it has a permanent one.
        self.check_permanent(permanent)
        self._holds_volatile = True
        self._check(self._lib.TPMLIB_SetState(_STATE_VOLATILE, state, len(state)), "TPMLIB_SetState")

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """Set the largest command (0: leave it); return it with its least and greatest (TPMLIB_SetBufferSize)."""
        least, greatest = _ffi.new("uint32_t *"), _ffi.new("uint32_t *")
        size = self._lib.TPMLIB_SetBufferSize(wanted, least, greatest)
        return int(size), int(least[0]), int(greatest[0])

    def info(self, flags: int) -> bytes:
        """What libtpms tells of the TPM, as JSON (TPMLIB_GetInfo)."""
        text = self._lib.TPMLIB_GetInfo(flags & _INFO_FLAGS)
        if text == _ffi.NULL:
            raise EngineError("LIBTPMS_FAILED", "TPMLIB_GetInfo failed")
        try:
            return bytes(_ffi.string(text))
        finally:
            # It comes from malloc.
            _libc.free(text)

    def hash_start(self) -> int:
        """Begin an H-CRTM event (_TPM_Hash_Start); returns a TPM_RESULT, as the two below do."""
        return int(self._lib.TPM_IO_Hash_Start())

    def hash_data(self, data: bytes) -> int:
        """Hash `data` (_TPM_Hash_Data)."""
        return int(self._lib.TPM_IO_Hash_Data(data, len(data)))

    def hash_end(self) -> int:
        """End the H-CRTM event (_TPM_Hash_End)."""
        return int(self._lib.TPM_IO_Hash_End())

    def established(self) -> bool:
        """The TPM established flag."""
        flag = _ffi.new("unsigned char *")
        self._check(self._lib.TPM_IO_TpmEstablished_Get(flag), "TPM_IO_TpmEstablished_Get")
        return bool(flag[0])

    def reset_established(self) -> int:
        """Clear that flag, if the locality may; returns a TPM_RESULT."""
        return int(self._lib.TPM_IO_TpmEstablished_Reset())

    def volatile(self) -> bytes:
        """Return the volatile state: PCRs, sessions, transient objects, clock (TPMLIB_VolatileAll_Store)."""
        buffer, size = _ffi.new("unsigned char **"), _ffi.new("uint32_t *")
        self._check(self._lib.TPMLIB_VolatileAll_Store(buffer, size), "TPMLIB_VolatileAll_Store")
        try:
            return bytes(_ffi.buffer(buffer[0], size[0]))
        finally:
            self._lib.TPM_Free(buffer[0])
