"""What a worker says is checked here, where it is read: sizes, ranges, names, order. Pure functions of one message.

A worker that runs a guest's TPM may be the guest's before long. The first message that no worker of ours would send is a
violation, and ends that worker; what it could say within these bounds is a claim about its own instance and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from google.protobuf.message import DecodeError

from vtpm.engine.stats import BUCKETS_NS, UNKNOWN_ORDINAL
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import ErrorKind
from vtpm.tpm.codes import CommandCode
from vtpm.tpm.command import HEADER, HEADER_SIZE, MAX_COMMAND_SIZE
from vtpm.tpm.keys import KeyAlgorithm
from vtpm.tpm.nv import MAX_NV_INDEX_SIZE
from vtpm.tpm.pcr import PCR_COUNT, PcrBank

# What SQLite's integers hold; epochs, versions and counts are kept there.
INTEGER_END: Final = 1 << 63
# The envelope of a permanent state. libtpms has 176 KiB of NV, and a state that is full of it some 150 KB. The larger it may
# be, the longer whoever commits in the same moment waits.
MAX_STATE_SIZE: Final = 256 << 10
# The envelope of a snapshot, which brings the event log.
MAX_SNAPSHOT_SIZE: Final = 512 << 10
# What a reply has beside a sealed state.
_BESIDE_SEALED: Final = 32 << 10
MAX_COMMIT_SIZE: Final = MAX_SNAPSHOT_SIZE + 256
MAX_EVENT_LOG_SIZE: Final = 256 << 10
# Of each event one byte; the smallest event takes a multiple of this in the log.
_MAX_ORIGINS: Final = 8 << 10
TOKEN_SIZE: Final = 16
# Commands since the daemon last asked: a million a second would take nine years.
_MAX_COUNT: Final = 1 << 48
_MAX_KEYS: Final = 16
_MAX_PUBLIC_SIZE: Final = 1024
_MAX_ATTEST_SIZE: Final = 2048
_MAX_SIGNATURE_SIZE: Final = 1024
_MAX_SECRET_SIZE: Final = 128
_MAX_TEXT: Final = 2000
_MAX_NAME: Final = 64
_ROLES: Final = frozenset(("EK", "AK", "GUEST_AK"))
_ALGORITHMS: Final = frozenset(str(algorithm) for algorithm in KeyAlgorithm)
_BANKS: Final = {bank.alg_id: bank.digest_size for bank in PcrBank}
_BANK_NAMES: Final = frozenset(bank.hash_name for bank in PcrBank)
_ORDINALS: Final = frozenset(int(code) for code in CommandCode) | {UNKNOWN_ORDINAL}
_FAULT_KINDS: Final = frozenset(kind.value for kind in ErrorKind)
_COMMIT_KINDS: Final = frozenset((pb.Commit.PERMANENT, pb.Commit.SNAPSHOT, pb.Commit.CONSUME))


class ViolationError(Exception):
    """A peer has sent what it never should. `code` says of which kind, the text what it was; neither quotes the peer."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


def _demand(holds: object, code: str, text: str) -> None:
    if not holds:
        raise ViolationError(code, text)


# ---- the commit socket -------------------------------------------------------------------------------------------------------


def commit(message: bytes, epoch: int) -> pb.Commit:
    """Return the commit in `message`, of a worker that owns its instance under `epoch`; 0: it owns none.

    Raises:
        ViolationError: it is none that such a worker makes.
    """
    try:
        found = pb.Commit.FromString(message)
    except DecodeError:
        raise ViolationError("COMMIT_MALFORMED", f"{len(message)} bytes on the commit socket are no message") from None
    # The one that comes all the time, and before a guest's answer.
    plain = found.kind == pb.Commit.PERMANENT and not found.token and not found.attached
    if plain and found.epoch == epoch != 0 and 0 < found.version < INTEGER_END and 0 < len(found.sealed) <= MAX_STATE_SIZE:
        return found
    _demand(epoch, "COMMIT_UNOWNED", "a commit of a worker that has no instance")
    _demand(found.epoch == epoch, "COMMIT_EPOCH", "a commit under an epoch that is not the worker's")
    _demand(0 < found.version < INTEGER_END, "COMMIT_VERSION", "a commit of a version that can't be")
    _demand(found.kind in _COMMIT_KINDS, "COMMIT_KIND", "a commit of an unknown kind")
    if found.kind == pb.Commit.CONSUME:
        _demand(len(found.token) == TOKEN_SIZE, "COMMIT_TOKEN", f"a token of {len(found.token)} bytes")
        _demand(not found.sealed and not found.attached, "COMMIT_FIELDS", "a state with what uses a snapshot up")
    else:
        most = MAX_SNAPSHOT_SIZE if found.kind == pb.Commit.SNAPSHOT else MAX_STATE_SIZE
        _demand(0 < len(found.sealed) <= most, "COMMIT_SIZE", f"a sealed state of {len(found.sealed)} bytes")
        _demand(not found.token, "COMMIT_FIELDS", "a token with a state")
        _demand(found.kind == pb.Commit.SNAPSHOT or not found.attached, "COMMIT_FIELDS", "a connection with a permanent state")
    return found


# ---- the operations socket ---------------------------------------------------------------------------------------------------

# By request: the reply to it. One that hibernates answers only if it does not.
REPLIES: Final = {
    "manufacture": "manufactured",
    "load": "loaded",
    "execute": "executed",
    "read_pcrs": "pcr_values",
    "quote": "quoted",
    "measure": "pcr_values",
    "get_event_log": "event_log",
    "reset": "done",
    "stop": "done",
    "get_status": "status",
    "get_keys": "keys",
    "hash_sequence": "done",
    "activate_credentials": "activated_credentials",
    "prove": "activated_credentials",
    "provision": "provisioned",
    "write_nv": "done",
    "read_nv": "nv_contents",
    "reprovision": "done",
    "hibernate": "",
}
UNSOLICITED: Final = ("imported", "identity_touched")
# What a reply may have in bytes before anything is kept of it; others: a fault, which every request may get.
_UNSOLICITED_SIZE: Final = 64
_REPLY_SIZE: Final = 16 << 10
_REPLY_SIZES: Final = {
    "manufacture": MAX_STATE_SIZE + _BESIDE_SEALED,
    "provision": MAX_STATE_SIZE + _BESIDE_SEALED,
    "get_event_log": MAX_EVENT_LOG_SIZE + _MAX_ORIGINS + 64,
    "get_keys": 32 << 10,
    "get_status": 32 << 10,
    "quote": 32 << 10,
}


def largest_reply(asked: Collection[str]) -> int:
    """Return how many bytes a reply may have, while `asked` are the kinds of the requests that wait for one."""
    return max((_REPLY_SIZES.get(kind, _REPLY_SIZE) for kind in asked), default=_UNSOLICITED_SIZE)


def parse_reply(message: bytes) -> tuple[pb.WorkerReply, str]:
    """Return a reply and the kind of its body; "" for a fault.

    Raises:
        ViolationError: it is no reply, or says two things at once.
    """
    try:
        reply = pb.WorkerReply.FromString(message)
    except DecodeError:
        raise ViolationError("REPLY_MALFORMED", f"{len(message)} bytes on the operations socket are no message") from None
    kind = reply.WhichOneof("body") or ""
    _demand(not (kind and reply.HasField("fault")), "REPLY_AMBIGUOUS", "a fault and an answer in one reply")
    _demand(bool(reply.id) != (kind in UNSOLICITED), "REPLY_UNKNOWN", "a reply to nothing, or an answer to what is not asked")
    return reply, kind


def outline(request: pb.WorkerRequest) -> pb.WorkerRequest:
    """Return what of a request its reply is checked against, so that no data and no key of it waits for that reply."""
    kept = pb.WorkerRequest(id=request.id)
    match request.WhichOneof("body"):
        case "measure":
            kept.measure.pcr = request.measure.pcr
        case "manufacture":
            kept.manufacture.hold = request.manufacture.hold
        case "prove" | "activate_credentials" as kind:
            credentials = getattr(kept, kind).credentials
            credentials.extend(pb.Credential() for _ in getattr(request, kind).credentials)
        case str() as kind:
            getattr(kept, kind).SetInParent()
    return kept


def reply_to(request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    """Check the reply to `request`, or to what `outline` gives of it.

    Raises:
        ViolationError: no worker answers that.
    """
    if reply.HasField("fault"):
        _check_fault(reply.fault)
        return
    asked, kind = request.WhichOneof("body") or "", reply.WhichOneof("body") or ""
    _demand(kind and kind == REPLIES.get(asked), "REPLY_KIND", f"{kind or 'nothing'} in answer to {asked}")
    check = _CHECKS.get(kind)
    if check is not None:
        check(request, reply)


def _printable(text: str, size: int) -> bool:
    return len(text) <= size and text.isprintable()


def _check_fault(fault: pb.Fault) -> None:
    _demand(fault.kind in _FAULT_KINDS, "FAULT_KIND", "a fault of an unknown kind")
    named = fault.reason.isascii() and fault.reason.replace("_", "").isalnum() and fault.reason.isupper()
    _demand(named and len(fault.reason) <= _MAX_NAME, "FAULT_REASON", "a fault whose reason is no name")
    _demand(_printable(fault.message, _MAX_TEXT) and _printable(fault.remedy, _MAX_TEXT), "FAULT_TEXT", "a fault's text")


def _check_executed(_request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    response = reply.executed.response
    _demand(HEADER_SIZE <= len(response) <= MAX_COMMAND_SIZE, "RESPONSE_SIZE", f"a response of {len(response)} bytes")
    _demand(HEADER.unpack_from(response)[1] == len(response), "RESPONSE_SIZE", "a response whose header has another size")


def _check_values(values: Sequence[pb.PcrValue]) -> None:
    _demand(len(values) <= len(_BANKS) * PCR_COUNT, "PCR_COUNT", f"{len(values)} PCR values")
    seen = set()
    for value in values:
        size = _BANKS.get(value.hash_alg)
        _demand(size is not None and value.index < PCR_COUNT, "PCR_UNKNOWN", "a value of a PCR that there is not")
        _demand(len(value.digest) == size, "PCR_DIGEST", f"a digest of {len(value.digest)} bytes")
        seen.add((value.hash_alg, value.index))
    _demand(len(seen) == len(values), "PCR_TWICE", "two values of one PCR")


def _check_pcr_values(request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    values = reply.pcr_values.values
    _check_values(values)
    if request.HasField("measure"):
        _demand(all(value.index == request.measure.pcr for value in values), "PCR_OTHER", "a PCR that was not measured into")


def _check_quoted(_request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    quoted = reply.quoted
    _demand(0 < len(quoted.attest) <= _MAX_ATTEST_SIZE, "QUOTE_SIZE", f"an attestation of {len(quoted.attest)} bytes")
    _demand(0 < len(quoted.signature) <= _MAX_SIGNATURE_SIZE, "QUOTE_SIZE", f"a signature of {len(quoted.signature)} bytes")
    _demand(0 < len(quoted.ak_tpmt_public) <= _MAX_PUBLIC_SIZE, "QUOTE_SIZE", "a public area")
    _check_values(quoted.values)


def _check_event_log(_request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    size = len(reply.event_log.event_log)
    _demand(size <= MAX_EVENT_LOG_SIZE, "EVENT_LOG_SIZE", f"an event log of {size} bytes")
    origins = reply.event_log.origins
    _demand(len(origins) <= _MAX_ORIGINS, "EVENT_ORIGINS", f"the origins of {len(origins)} events")


def _check_key_list(keys: Sequence[pb.ManufacturedKey]) -> None:
    _demand(len(keys) <= _MAX_KEYS, "KEY_COUNT", f"{len(keys)} keys")
    for key in keys:
        _demand(key.role in _ROLES and key.algorithm in _ALGORITHMS, "KEY_KIND", "a key of an unknown kind")
        _demand(0 < len(key.tpmt_public) <= _MAX_PUBLIC_SIZE, "KEY_SIZE", f"a public area of {len(key.tpmt_public)} bytes")


def _check_keys(_request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    keys = reply.keys
    _check_key_list(keys.keys)
    banks = keys.pcr_banks
    _demand(len(set(banks)) == len(banks) and _BANK_NAMES.issuperset(banks), "KEYS_BANKS", "PCR banks that there are not")
    ordinals = keys.identity_ordinals
    known = len(set(ordinals)) == len(ordinals) and _ORDINALS.issuperset(ordinals)
    _demand(known, "KEYS_ORDINALS", "ordinals that there are not")
    _demand(keys.identity_generation < INTEGER_END, "KEYS_GENERATION", "a generation that can't be")


def _check_status(_request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    status = reply.status
    _demand(status.epoch < INTEGER_END and status.version < INTEGER_END, "STATUS_VERSION", "an epoch or version that can't be")
    ordinals = [row.ordinal for row in status.ordinals]
    known = len(set(ordinals)) == len(ordinals) and _ORDINALS.issuperset(ordinals)
    _demand(known, "STATUS_ORDINALS", "ordinals that there are not")
    for row in status.ordinals:
        _demand(row.count <= _MAX_COUNT and row.nanos < INTEGER_END, "STATUS_COUNT", "a count that can't be")
        timed = list(row.buckets)
        _demand(len(timed) == len(BUCKETS_NS) + 1, "STATUS_BUCKETS", f"a histogram of {len(timed)} buckets")
        _demand(sum(timed) <= row.count, "STATUS_COUNT", "more commands timed than counted")


def _check_manufactured(request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    made = reply.manufactured
    _check_key_list(made.keys)
    if request.manufacture.hold:
        _demand(not made.sealed, "SEALED_SIZE", "a state of a TPM that is held")
    else:
        _check_sealed(made.sealed)
    _demand(_printable(made.properties.vendor, _MAX_NAME), "PROPERTIES", "a vendor string")


def _check_provisioned(_request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    _check_sealed(reply.provisioned.sealed)


def _check_sealed(sealed: bytes) -> None:
    _demand(0 < len(sealed) <= MAX_STATE_SIZE, "SEALED_SIZE", f"a sealed state of {len(sealed)} bytes")


def _check_secrets(request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    secrets = reply.activated_credentials.secrets
    asked = request.prove if request.HasField("prove") else request.activate_credentials
    wanted = len(asked.credentials)
    _demand(len(secrets) == wanted, "SECRET_COUNT", f"{len(secrets)} secrets of {wanted} credentials")
    _demand(all(len(secret) <= _MAX_SECRET_SIZE for secret in secrets), "SECRET_SIZE", "a secret that is too long")


def _check_contents(_request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    size = len(reply.nv_contents.data)
    _demand(size <= MAX_NV_INDEX_SIZE, "NV_SIZE", f"{size} bytes of an NV index")


_CHECKS: Final[dict[str, Callable[[pb.WorkerRequest, pb.WorkerReply], None]]] = {
    "manufactured": _check_manufactured,
    "executed": _check_executed,
    "pcr_values": _check_pcr_values,
    "quoted": _check_quoted,
    "event_log": _check_event_log,
    "status": _check_status,
    "keys": _check_keys,
    "activated_credentials": _check_secrets,
    "provisioned": _check_provisioned,
    "nv_contents": _check_contents,
}
