"""Two loads of one state never give the same random numbers, and nobody can tell that anything was done about it."""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import raw
from vtpm.engine import libtpms
from vtpm.engine.libtpms import Libtpms
from vtpm.engine.randomness import freshen
from vtpm.errors import EngineError
from vtpm.tpm.codes import CommandCode, Handle, Tag
from vtpm.tpm.command import HEADER_SIZE, build
from vtpm.tpm.service import stir_random_command

LOADS = 20
RC_INITIALIZE, RC_EXCLUSIVE = 0x100, 0x121
NULL = 0x40000007
# commandDigest of TPMS_COMMAND_AUDIT_INFO, as TPM2B, behind auditDigest.
DIGESTS_SIZE = 2 * (2 + 32)
AUDIT_EXCLUSIVE = 1 << 1
NO_AUTH = 0x40000010

# libtpms keeps one TPM for a process, and the callbacks of this object, so it lives as long as the process.
THE_TPM: list[Libtpms] = []


@pytest.fixture
def tpm() -> Iterator[Libtpms]:
    """A new TPM that firmware has started."""
    if not THE_TPM:
        THE_TPM.append(Libtpms())
    made = THE_TPM[0]
    made.manufacture()
    succeed(made, raw.startup_clear())
    yield made
    made.forget()


def succeed(tpm: Libtpms, command: bytes) -> bytes:
    response = tpm.process(command)
    assert raw.rc_of(response) == 0, hex(raw.rc_of(response))
    return response[HEADER_SIZE:]


def load(tpm: Libtpms, volatile: bytes) -> None:
    assert tpm.permanent is not None
    tpm.power_on(tpm.permanent, volatile)


def random(tpm: Libtpms) -> bytes:
    return succeed(tpm, raw.get_random(32))


def nonce(tpm: Libtpms) -> bytes:
    """The nonceTPM of TPM2_StartAuthSession."""
    return succeed(tpm, start_session())[4:]


def created_key(tpm: Libtpms) -> bytes:
    """A key under the null hierarchy, which TPM2_CreatePrimary makes of its seed and TPM2_Create of random numbers."""
    primary = succeed(tpm, create(CommandCode.CreatePrimary, NULL, 0x30472))
    made = succeed(tpm, create(CommandCode.Create, int.from_bytes(primary[:4], "big"), 0x40472))
    succeed(tpm, build(CommandCode.FlushContext, primary[:4]))
    return made


def ephemeral(tpm: Libtpms) -> bytes:
    return succeed(tpm, build(CommandCode.EC_Ephemeral, struct.pack(">H", 3)))


def start_session() -> bytes:
    """TPM2_StartAuthSession of an HMAC session that is bound to nothing."""
    body = struct.pack(">II", NULL, NULL) + struct.pack(">H", 16) + bytes(16) + struct.pack(">HBHH", 0, 0, 0x10, 0x0B)
    return build(CommandCode.StartAuthSession, body)


def create(command: CommandCode, parent: int, attributes: int) -> bytes:
    """A P-256 key below a parent with an empty auth: restricted decryption, or signing."""
    symmetric = struct.pack(">HHH", 6, 128, 0x43) if attributes & 0x20000 else struct.pack(">H", 0x10)
    scheme = struct.pack(">HHHHH", 0x10, 3, 0x10, 0, 0)
    public = struct.pack(">HHIH", 0x23, 0x0B, attributes, 0) + symmetric + scheme
    body = struct.pack(">HHH", 4, 0, 0) + struct.pack(">H", len(public)) + public + struct.pack(">HI", 0, 0)
    return build(command, struct.pack(">I", parent) + raw.EMPTY_PASSWORD_AREA + body, Tag.SESSIONS)


@pytest.mark.parametrize("what", [random, nonce, created_key, ephemeral])
def test_twenty_loads_of_a_volatile_state_give_twenty_different(tpm: Libtpms, what: Callable[[Libtpms], bytes]) -> None:
    volatile = tpm.volatile()
    made = set()
    for _ in range(LOADS):
        load(tpm, volatile)
        made.add(what(tpm))
    assert len(made) == LOADS


@pytest.mark.parametrize("what", [random, nonce, created_key, ephemeral])
def test_twenty_power_ons_of_a_permanent_state_give_twenty_different(tpm: Libtpms, what: Callable[[Libtpms], bytes]) -> None:
    succeed(tpm, build(CommandCode.Shutdown, bytes(2)))
    permanent = tpm.permanent
    assert permanent is not None
    made = set()
    for _ in range(LOADS):
        tpm.power_on(permanent)
        succeed(tpm, raw.startup_clear())
        made.add(what(tpm))
    assert len(made) == LOADS


@pytest.mark.parametrize("startup", [0, 1])
@pytest.mark.parametrize("what", [random, nonce, created_key])
def test_so_does_a_permanent_state_that_went_down_with_its_state_saved(
    tpm: Libtpms, what: Callable[[Libtpms], bytes], startup: int
) -> None:
    succeed(tpm, build(CommandCode.Shutdown, struct.pack(">H", 1)))
    permanent = tpm.permanent
    assert permanent is not None
    made = set()
    for _ in range(LOADS):
        tpm.power_on(permanent)
        succeed(tpm, build(CommandCode.Startup, struct.pack(">H", startup)))
        made.add(what(tpm))
    assert len(made) == LOADS


def test_a_load_writes_no_nv(tpm: Libtpms) -> None:
    volatile = tpm.volatile()
    permanent, tpm.dirty = tpm.permanent, False
    load(tpm, volatile)
    assert not tpm.dirty
    assert tpm.permanent == permanent


def test_nothing_but_the_seed_and_its_checksum_changes_while_the_guest_uses_an_ephemeral_key(tpm: Libtpms) -> None:
    ephemeral(tpm)
    before = tpm.volatile()
    after = freshen(before, lambda size: b"\xff" * size)
    assert after is not None
    changed = [at for at, (old, new) in enumerate(zip(before[:-20], after[:-20], strict=True)) if old != new]
    assert len(changed) == 48
    assert changed == list(range(changed[0], changed[0] + 48))
    assert after[-20:] == hashlib.sha1(after[:-20]).digest()
    # XORed, not replaced: what randomness was in it is still in it.
    assert freshen(before, bytes) == before


def test_an_exclusive_audit_session_stays_exclusive(tpm: Libtpms) -> None:
    session = succeed(tpm, start_session())[:4]
    first = audited(tpm, session)
    assert first & AUDIT_EXCLUSIVE
    load(tpm, tpm.volatile())
    assert audited(tpm, session, exclusive=True) & AUDIT_EXCLUSIVE
    # What a command in between does to it.
    random(tpm)
    with pytest.raises(AssertionError, match=hex(RC_EXCLUSIVE)):
        audited(tpm, session, exclusive=True)


def audited(tpm: Libtpms, session: bytes, *, exclusive: bool = False) -> int:
    """Run TPM2_GetRandom in an audit session; return the session attributes of the response.

    A session that is bound to nothing and has no salt has an empty key, and no auth value is involved: no HMAC.
    """
    attributes = 1 | 1 << 7 | (AUDIT_EXCLUSIVE if exclusive else 0)
    area = session + struct.pack(">HBH", 0, attributes, 0)
    command = build(CommandCode.GetRandom, struct.pack(">I", len(area)) + area + struct.pack(">H", 8), Tag.SESSIONS)
    response = succeed(tpm, command)
    (size,) = struct.unpack_from(">I", response)
    (nonce_size,) = struct.unpack_from(">H", response, 4 + size)
    return int(response[4 + size + 2 + nonce_size])


def test_the_guests_command_audit_digest_stays_what_it_is(tpm: Libtpms) -> None:
    # TPM2_SetCommandCodeAuditStatus: TPM2_StirRandom is to be audited.
    owner = struct.pack(">I", Handle.PLATFORM) + raw.EMPTY_PASSWORD_AREA
    audit = struct.pack(">HIII", 0x10, 1, CommandCode.StirRandom, 0)
    succeed(tpm, build(CommandCode.SetCommandCodeAuditStatus, owner + audit, Tag.SESSIONS))

    def digest() -> bytes:
        two = struct.pack(">I", 9) + struct.pack(">IHBH", 0x40000009, 0, 0, 0)
        areas = struct.pack(">I", 18) + two[4:] * 2
        body = struct.pack(">II", Handle.ENDORSEMENT, NULL) + areas + struct.pack(">HH", 0, 0x10)
        attest = succeed(tpm, build(CommandCode.GetCommandAuditDigest, body, Tag.SESSIONS))
        # A TPM2B_ATTEST, which ends with the two digests.
        (size,) = struct.unpack_from(">H", attest, 4)
        return attest[4 + 2 + size - DIGESTS_SIZE : 4 + 2 + size]

    before = digest()
    load(tpm, tpm.volatile())
    assert digest() == before
    # What the command itself does to it.
    succeed(tpm, stir_random_command(bytes(32)))
    assert digest() != before


def test_a_tpm_that_was_not_started_is_loaded_as_it_was(tpm: Libtpms) -> None:
    permanent = tpm.permanent
    assert permanent is not None
    tpm.power_on(permanent)
    load(tpm, tpm.volatile())
    assert raw.rc_of(tpm.process(raw.get_random(8))) == RC_INITIALIZE
    succeed(tpm, raw.startup_clear())


def test_half_an_h_crtm_event_goes_on_where_it_was(tpm: Libtpms) -> None:
    permanent = tpm.permanent
    assert permanent is not None

    def measure(*, moved: bool) -> bytes:
        tpm.power_on(permanent)
        assert tpm.hash_start() == 0
        assert tpm.hash_data(b"firm") == 0
        if moved:
            tpm.power_on(permanent, tpm.volatile())
        assert tpm.hash_data(b"ware") == 0
        assert tpm.hash_end() == 0
        succeed(tpm, raw.startup_clear())
        return succeed(tpm, raw.pcr_read(0))

    assert measure(moved=True) == measure(moved=False)


def test_sessions_objects_and_pcrs_are_what_they_were(tpm: Libtpms) -> None:
    succeed(tpm, raw.pcr_extend(16, b"\x07" * 32))
    session = succeed(tpm, start_session())[:4]
    primary = succeed(tpm, create(CommandCode.CreatePrimary, NULL, 0x30472))
    before = succeed(tpm, raw.pcr_read(16))
    load(tpm, tpm.volatile())
    assert succeed(tpm, raw.pcr_read(16)) == before
    succeed(tpm, build(CommandCode.ReadPublic, primary[:4]))
    succeed(tpm, build(CommandCode.FlushContext, session))


def test_a_state_of_an_unknown_layout_is_stirred(tpm: Libtpms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libtpms, "freshen", lambda _state, _entropy: None)
    volatile = tpm.volatile()
    made = set()
    for _ in range(LOADS):
        load(tpm, volatile)
        made.add((random(tpm), nonce(tpm)))
    assert len(made) == LOADS
    # Half a command of a guest is where it was.
    tpm.command[:4] = b"half"
    load(tpm, volatile)
    assert tpm.command[:4] == b"half"
    # Before TPM2_Startup there is nothing to stir.
    permanent = tpm.permanent
    assert permanent is not None
    tpm.power_on(permanent)
    load(tpm, tpm.volatile())
    succeed(tpm, raw.startup_clear())


def test_a_damaged_state_is_refused_as_before(tpm: Libtpms) -> None:
    volatile, permanent = tpm.volatile(), tpm.permanent
    assert permanent is not None
    for damaged in (volatile[:-1] + bytes([volatile[-1] ^ 1]), volatile[:-100], volatile[:60]):
        assert freshen(damaged, os.urandom) == damaged
        with pytest.raises(EngineError):
            tpm.power_on(permanent, damaged)


@pytest.mark.parametrize("size", [0, 1, 19, 20])
def test_a_state_that_is_cut_to_nothing_is_no_reason_to_start_anew(tpm: Libtpms, size: int) -> None:
    volatile, permanent = tpm.volatile(), tpm.permanent
    assert permanent is not None
    with pytest.raises(EngineError) as refused:
        tpm.power_on(permanent, volatile[:size])
    assert refused.value.reason == "VOLATILE_STATE_CUT"
    load(tpm, volatile)
    random(tpm)


@functools.cache
def state_of_a_tpm() -> bytes:
    if not THE_TPM:
        THE_TPM.append(Libtpms())
    THE_TPM[0].manufacture()
    try:
        succeed(THE_TPM[0], raw.startup_clear())
        return THE_TPM[0].volatile()
    finally:
        THE_TPM[0].forget()


@settings(deadline=None)
@given(st.data())
def test_bytes_of_any_kind_give_bytes_of_the_same_size_or_none(data: st.DataObject) -> None:
    body = bytearray(state_of_a_tpm()[:-20])
    for _ in range(data.draw(st.integers(0, 4))):
        body[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
    cut = bytes(body[: data.draw(st.integers(0, len(body)))])
    state = cut + hashlib.sha1(cut).digest()
    mended = freshen(state, os.urandom)
    assert mended is None or len(mended) == len(state)
