"""swtpm's state files: read and written as swtpm does, and whatever is wrong with one is said by name."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vtpm.errors import InvalidArgumentError, SealedStateError, VtpmError
from vtpm.tpm.ptm import MAX_STATE_SIZE, migration_blob
from vtpm.wire import swtpm_keys, swtpm_state
from vtpm.wire.swtpm_keys import Kdf, KeyFormat, KeyMode

KEY_128, KEY_256 = bytes(range(16)), bytes(range(32))
# As libtpms begins a TPM 2.0's permanent state.
PERMANENT = bytes.fromhex("0003 ab364723 0003") + b"the state of a TPM"
# Written by swtpm's rules with swtpm's own means: openssl enc -aes-128-cbc and openssl dgst -hmac, key 00 01 … 0f.
WRITTEN_ELSEWHERE = bytes.fromhex(
    "02 01 000a 0001 0000006c"
    "0002 00000020 3d6b94ac9afb6fc0ae36de2330d113182d1a74922a2587cceae6a8d007e2da37"
    "0003 00000020 39ab73f1523797ad3eaaa49bf8c721a7a4b92245b91617bf0ced7a2a20e3bace"
    "0006 00000010 a0a1a2a3a4a5a6a7a8a9aaabacadaeaf"
)

payloads = st.binary(min_size=1, max_size=200)
keys = st.one_of(st.none(), st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32))


def reason_of(function: Callable[[], object]) -> str:
    with pytest.raises((SealedStateError, InvalidArgumentError)) as caught:
        function()
    assert caught.value.remedy
    return caught.value.reason


OUTCOMES = {
    "state",
    "SWTPM_STATE_INVALID",
    "SWTPM_STATE_VERSION_UNSUPPORTED",
    "SWTPM_STATE_ENCRYPTED",
    "SWTPM_STATE_NOT_ENCRYPTED",
    "SWTPM_STATE_NOT_AUTHENTIC",
    "SWTPM_KEY_INVALID",
}


def outcome(function: Callable[[], bytes]) -> str:
    try:
        return "state" if function() else "nothing"
    except VtpmError as error:
        return error.reason


def record(tag: int, data: bytes) -> bytes:
    return struct.pack(">HI", tag, len(data)) + data


def file_of(records: bytes, *, flags: int = 0, version: int = 2, min_version: int = 1, size: int | None = None) -> bytes:
    total = 10 + len(records) if size is None else size
    return struct.pack(">BBHHI", version, min_version, 10, flags, total) + records


def encrypted(key: bytes, ciphertext: bytes, iv: bytes, *, flags: int) -> bytes:
    """A file with a MAC that fits, whatever is in it."""
    mac = hmac.digest(key, ciphertext + iv, "sha256")
    return file_of(record(2, ciphertext) + record(3, mac) + record(6, iv), flags=flags)


@settings(deadline=None)
@given(payload=payloads, key=keys)
def test_what_is_built_is_read(payload: bytes, key: bytes | None) -> None:
    built = swtpm_state.build(payload, key)
    assert swtpm_state.parse(built, key) == payload
    mode = swtpm_state.mode_of(built)
    assert (mode and mode.key_size) == (key and len(key))


@settings(deadline=None)
@given(payload=payloads)
def test_a_blob_is_what_get_stateblob_gives(payload: bytes) -> None:
    blob = migration_blob(payload)
    assert blob == file_of(record(4, record(1, payload)), flags=4)
    assert swtpm_state.payload_of(blob) == payload


def test_a_plain_file_is_one_record_behind_the_header() -> None:
    assert swtpm_state.build(b"abc") == bytes.fromhex("02 01 000a 0000 00000013 0001 00000003") + b"abc"


@pytest.mark.parametrize("key", [KEY_128, KEY_256], ids=["128", "256"])
@pytest.mark.parametrize("size", [1, 15, 16, 31, 32, 33, 64])
def test_padding_and_iv_are_of_the_keys_size(key: bytes, size: int) -> None:
    built = swtpm_state.build(bytes(size), key)
    padded = (size // len(key) + 1) * len(key)
    assert struct.unpack_from(">HI", built, 10) == (2, padded)
    assert struct.unpack_from(">HI", built, 16 + padded) == (3, 32)
    assert struct.unpack_from(">HI", built, 54 + padded) == (6, len(key))
    assert len(built) == 60 + padded + len(key)


def test_a_file_made_with_openssl_alone_is_read() -> None:
    assert swtpm_state.parse(WRITTEN_ELSEWHERE, KEY_128) == PERMANENT


def test_no_two_files_share_an_iv() -> None:
    assert swtpm_state.build(b"state", KEY_256)[-32:] != swtpm_state.build(b"state", KEY_256)[-32:]


def test_a_key_of_another_size_is_refused() -> None:
    assert reason_of(lambda: swtpm_state.build(b"state", bytes(24))) == "SWTPM_KEY_INVALID"
    assert reason_of(lambda: swtpm_state.parse(swtpm_state.build(b"state", KEY_256), KEY_128)) == "SWTPM_KEY_INVALID"


def test_encrypted_without_a_key_and_plain_with_one_are_refused() -> None:
    assert reason_of(lambda: swtpm_state.parse(swtpm_state.build(b"state", KEY_256))) == "SWTPM_STATE_ENCRYPTED"
    assert reason_of(lambda: swtpm_state.parse(swtpm_state.build(b"state"), KEY_256)) == "SWTPM_STATE_NOT_ENCRYPTED"


@settings(deadline=None)
@given(payload=payloads, key=keys, other=st.binary(min_size=16, max_size=32))
def test_another_key_does_not_open_it(payload: bytes, key: bytes | None, other: bytes) -> None:
    assume(key is not None and other != key)
    built = swtpm_state.build(payload, key)
    assert reason_of(lambda: swtpm_state.parse(built, other)) in ("SWTPM_STATE_NOT_AUTHENTIC", "SWTPM_KEY_INVALID")


# ---- damage --------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(payload=payloads, key=keys, data=st.data())
def test_a_file_that_is_cut_anywhere_is_refused(payload: bytes, key: bytes | None, data: st.DataObject) -> None:
    built = swtpm_state.build(payload, key)
    cut = built[: data.draw(st.integers(0, len(built) - 1))]
    assert reason_of(lambda: swtpm_state.parse(cut, key)) == "SWTPM_STATE_INVALID"
    # The same with a header that does not lie.
    mended = cut[:6] + struct.pack(">I", len(cut)) + cut[10:] if len(cut) >= 10 else cut
    assert reason_of(lambda: swtpm_state.parse(mended, key)) == "SWTPM_STATE_INVALID"


@settings(deadline=None)
@given(payload=payloads, data=st.data())
def test_a_blob_that_is_cut_anywhere_is_refused(payload: bytes, data: st.DataObject) -> None:
    blob = migration_blob(payload)
    cut = blob[: data.draw(st.integers(0, len(blob) - 1))]
    assert reason_of(lambda: swtpm_state.payload_of(cut)) == "SWTPM_STATE_INVALID"


@settings(deadline=None)
@given(payload=payloads, key=keys, data=st.data())
def test_a_flipped_bit_of_an_encrypted_file_is_found(payload: bytes, key: bytes | None, data: st.DataObject) -> None:
    assume(key is not None)
    built = bytearray(swtpm_state.build(payload, key))
    # Byte 1, the least version of readers, may say less than 2.
    bit = data.draw(st.integers(0, len(built) * 8 - 1).filter(lambda number: number // 8 != 1))
    built[bit // 8] ^= 1 << bit % 8
    reason_of(lambda: swtpm_state.parse(bytes(built), key))


@settings(deadline=None)
@given(payload=payloads, data=st.data())
def test_a_flipped_bit_of_a_plain_files_frame_is_found(payload: bytes, data: st.DataObject) -> None:
    built = bytearray(swtpm_state.build(payload))
    bit = data.draw(st.integers(0, 16 * 8 - 1).filter(lambda number: number // 8 != 1))
    built[bit // 8] ^= 1 << bit % 8
    reason_of(lambda: swtpm_state.parse(bytes(built)))


@settings(deadline=None)
@given(payload=payloads, key=keys, lie=st.integers(0, 0xFFFF_FFFF), which=st.integers(0, 3))
def test_lengths_that_lie_are_found(payload: bytes, key: bytes | None, lie: int, which: int) -> None:
    built = bytearray(swtpm_state.build(payload, key))
    places = [6, 12]
    while key is not None and len(places) < 4:
        places.append(places[-1] + struct.unpack_from(">I", built, places[-1])[0] + 6)
    place = places[which % len(places)]
    assume(struct.unpack_from(">I", built, place)[0] != lie)
    struct.pack_into(">I", built, place, lie)
    reason_of(lambda: swtpm_state.parse(bytes(built), key))


@settings(deadline=None)
@given(data=st.binary(max_size=300), key=keys)
def test_any_bytes_are_state_or_an_error_by_name(data: bytes, key: bytes | None) -> None:
    assert outcome(lambda: swtpm_state.parse(data, key)) in OUTCOMES
    assert outcome(lambda: swtpm_state.payload_of(data)) in OUTCOMES


@settings(deadline=None)
@given(records=st.binary(max_size=100), flags=st.integers(0, 31), key=keys)
def test_any_records_behind_a_sound_header_are_state_or_an_error_by_name(records: bytes, flags: int, key: bytes | None) -> None:
    data = file_of(records, flags=flags)
    assert outcome(lambda: swtpm_state.parse(data, key)) in OUTCOMES
    assert outcome(lambda: swtpm_state.payload_of(data)) in OUTCOMES


@pytest.mark.parametrize(
    "data",
    [
        file_of(b""),
        file_of(record(1, b"")),
        file_of(record(1, b"a") + record(1, b"b")),
        file_of(record(1, b"a") + record(9, b"b")),
        file_of(record(1, b"a") + b"\0"),
        file_of(record(4, record(1, b"a"))),
        file_of(record(1, b"a"), flags=0x20),
        file_of(record(1, b"a"), flags=4),
        file_of(record(1, b"a"), size=16),
        struct.pack(">BBHHI", 2, 1, 11, 0, 18) + b"\0" + record(1, b"a"),
    ],
    ids=[
        "no record", "empty state", "twice", "unknown record", "half a record", "a blob without its flag", "unknown flag",
        "a blob's flag", "wrong size", "longer header",
    ],
)  # fmt: skip
def test_what_swtpm_does_not_write_is_refused(data: bytes) -> None:
    assert reason_of(lambda: swtpm_state.parse(data)) == "SWTPM_STATE_INVALID"


@pytest.mark.parametrize(
    ("ciphertext", "iv"),
    [(b"", bytes(16)), (bytes(17), bytes(16)), (bytes(16), b""), (bytes(16), bytes(32)), (bytes(16), bytes(16))],
    ids=["no ciphertext", "half a block", "no IV", "IV of another size", "bad padding"],
)
def test_a_mac_that_fits_does_not_make_nonsense_pass(ciphertext: bytes, iv: bytes) -> None:
    data = encrypted(KEY_128, ciphertext, iv, flags=1)
    assert reason_of(lambda: swtpm_state.parse(data, KEY_128)) == "SWTPM_STATE_INVALID"


def test_an_iv_is_not_taken_for_ciphertext() -> None:
    # The MAC covers both without a mark between them: it fits here too.
    built = swtpm_state.build(PERMANENT, KEY_128)
    ciphertext, mac, iv = built[16:-60], built[-54:-22], built[-16:]
    assert swtpm_state.parse(file_of(record(2, ciphertext) + record(3, mac) + record(6, iv), flags=1), KEY_128) == PERMANENT
    moved = file_of(record(2, ciphertext + iv) + record(3, mac), flags=1)
    assert reason_of(lambda: swtpm_state.parse(moved, KEY_128)) == "SWTPM_STATE_INVALID"


def test_other_versions_are_refused_by_name() -> None:
    for version, least in ((1, 1), (3, 1), (2, 3)):
        data = file_of(record(1, b"a"), version=version, min_version=least)
        assert reason_of(lambda data=data: swtpm_state.parse(data)) == "SWTPM_STATE_VERSION_UNSUPPORTED"  # type: ignore[misc]


def test_more_than_any_tpms_state_is_refused() -> None:
    data = swtpm_state.build(bytes(MAX_STATE_SIZE))
    assert reason_of(lambda: swtpm_state.parse(data)) == "SWTPM_STATE_TOO_LARGE"


@pytest.mark.parametrize("flags", [0x5, 0x6, 0xD, 0x16])
def test_a_blob_that_is_encrypted_is_refused_by_name(flags: int) -> None:
    data = file_of(record(4, record(2, b"a")), flags=flags)
    assert reason_of(lambda: swtpm_state.payload_of(data)) == "SWTPM_STATE_ENCRYPTED"


def test_a_state_file_is_no_blob() -> None:
    assert reason_of(lambda: swtpm_state.payload_of(swtpm_state.build(b"state"))) == "SWTPM_STATE_INVALID"


def test_only_a_tpm_2_0s_permanent_state_passes() -> None:
    swtpm_state.check_permanent(PERMANENT)
    for other in (b"", PERMANENT[:7], bytes.fromhex("0004 45637889 0001"), b"\0" * 100):
        assert reason_of(lambda other=other: swtpm_state.check_permanent(other)) == "SWTPM_STATE_NOT_PERMANENT"  # type: ignore[misc]


# ---- keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{}", "0x{}", "{}\n", "{}\r\n", "{} a comment", "0x{}\nanother line\n"])
@pytest.mark.parametrize(("mode", "key"), [(KeyMode.AES_128_CBC, KEY_128), (KeyMode.AES_256_CBC, KEY_256)])
def test_a_hex_key_is_read_as_swtpm_reads_it(text: str, mode: KeyMode, key: bytes) -> None:
    content = text.format(key.hex().upper()).encode()
    assert swtpm_keys.key_from_file(content, mode, KeyFormat.HEX) == key


def test_a_binary_key_is_the_file() -> None:
    assert swtpm_keys.key_from_file(KEY_256, KeyMode.AES_256_CBC, KeyFormat.BINARY) == KEY_256
    assert swtpm_keys.key_from_file(KEY_128, KeyMode.AES_128_CBC, KeyFormat.BINARY) == KEY_128


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (b"", KeyFormat.HEX),
        (b"00" * 31, KeyFormat.HEX),
        (b"00" * 33, KeyFormat.HEX),
        (b"00" * 31 + b"0", KeyFormat.HEX),
        (b"00" * 31 + b"0g", KeyFormat.HEX),
        (b" " + b"00" * 32, KeyFormat.HEX),
        (b"00" * 32 + b"g", KeyFormat.HEX),
        (bytes(32), KeyFormat.HEX),
        (b"", KeyFormat.BINARY),
        (bytes(16), KeyFormat.BINARY),
        (bytes(33), KeyFormat.BINARY),
        (b"00" * 32, KeyFormat.BINARY),
    ],
)
def test_a_key_file_that_does_not_hold_a_key_is_refused(content: bytes, form: KeyFormat) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        swtpm_keys.key_from_file(content, KeyMode.AES_256_CBC, form, subject="key")
    assert caught.value.reason == "SWTPM_KEY_INVALID"
    assert not content or content.hex() not in str(caught.value)


@pytest.mark.parametrize("mode", list(KeyMode))
def test_a_password_gives_swtpms_key(mode: KeyMode) -> None:
    password = b"a secret\n"
    pbkdf2 = hashlib.pbkdf2_hmac("sha512", password, b"swtpm", 1000, mode.key_size)
    assert swtpm_keys.key_from_password(password, mode, Kdf.PBKDF2) == pbkdf2
    assert swtpm_keys.key_from_password(password, mode, Kdf.SHA512) == hashlib.sha512(password).digest()[: mode.key_size]


def test_an_empty_password_is_refused() -> None:
    assert reason_of(lambda: swtpm_keys.key_from_password(b"", KeyMode.AES_256_CBC, Kdf.PBKDF2)) == "SWTPM_KEY_INVALID"


@settings(deadline=None)
@given(key=st.binary(min_size=32, max_size=32), payload=st.binary(min_size=16, max_size=64))
def test_no_error_shows_a_key_or_state(key: bytes, payload: bytes) -> None:
    built = swtpm_state.build(payload, key)
    damaged = built[:20] + bytes([built[20] ^ 1]) + built[21:]
    for function in (
        lambda: swtpm_state.parse(damaged, key),
        lambda: swtpm_state.parse(swtpm_state.build(payload), key),
        lambda: swtpm_keys.key_from_file(key.hex().encode() + b"0", KeyMode.AES_256_CBC, KeyFormat.HEX),
        lambda: swtpm_state.check_permanent(b"\0" + payload),
    ):
        with pytest.raises(VtpmError) as caught:
            function()
        told = f"{caught.value!r} {caught.value} {caught.value.metadata}"
        for secret in (key, payload):
            assert secret.hex()[:16] not in told
            assert repr(secret)[2:14] not in told or len(set(secret)) == 1
