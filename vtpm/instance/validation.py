"""What names, labels and profiles may be. Everything here comes from a caller and is checked before anything is done."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.instance.model import CreateRequest
from vtpm.pki.model import check_text
from vtpm.store.model import PlatformRecord, ProfileRecord
from vtpm.tpm.keys import KeyAlgorithm
from vtpm.tpm.layouts import NvLayout
from vtpm.tpm.pcr import PcrBank

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_LABEL_KEY: Final = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9._/-]{0,61}[a-zA-Z0-9])?")
_MAX_LABELS: Final = 64
_MAX_LABEL_VALUE: Final = 256

DEFAULT_EK_ALGORITHMS: Final = (KeyAlgorithm.RSA_2048, KeyAlgorithm.ECC_P384)
# Those that agents on Google Cloud know.
GCE_EK_ALGORITHMS: Final = (KeyAlgorithm.RSA_2048, KeyAlgorithm.ECC_P256)
DEFAULT_AK_ALGORITHM: Final = KeyAlgorithm.ECC_P256
DEFAULT_PCR_BANKS: Final = (PcrBank.SHA256, PcrBank.SHA384)
_AK_ALGORITHMS: Final = (KeyAlgorithm.ECC_P256, KeyAlgorithm.RSA_2048)


def check_name(name: str) -> str:
    """Return `name` if an instance may have it.

    A UUID is refused, as it could be taken for another instance's id.

    Raises:
        InvalidArgumentError: INSTANCE_NAME_INVALID.
    """
    if not _NAME.fullmatch(name) or _is_uuid(name):
        raise InvalidArgumentError(
            "INSTANCE_NAME_INVALID",
            "an instance name has 1 to 63 characters of a-z 0-9 . _ -, begins with a letter or digit, and is no UUID",
            subject=name[:80],
        )
    return name


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return `labels` if they are within bounds.

    Raises:
        InvalidArgumentError: LABELS_INVALID.
    """
    if len(labels) > _MAX_LABELS:
        raise InvalidArgumentError("LABELS_INVALID", f"an instance has at most {_MAX_LABELS} labels")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise InvalidArgumentError("LABELS_INVALID", "a label key has 1 to 63 of a-z A-Z 0-9 . _ / -", subject=key[:80])
        if len(value) > _MAX_LABEL_VALUE or not value.isprintable():
            raise InvalidArgumentError(
                "LABELS_INVALID", f"a label value has at most {_MAX_LABEL_VALUE} printable characters", subject=key
            )
    return dict(labels)


def check_request_id(request_id: str) -> str:
    """Return `request_id` in its canonical form; empty stays empty.

    Raises:
        InvalidArgumentError: REQUEST_ID_INVALID.
    """
    if not request_id:
        return ""
    try:
        return str(uuid.UUID(request_id))
    except ValueError:
        raise InvalidArgumentError("REQUEST_ID_INVALID", "request_id must be a UUID") from None


def make_profile(request: CreateRequest) -> ProfileRecord:
    """Return the profile that `request` asks for, defaults filled in, in a fixed order.

    Raises:
        InvalidArgumentError: PROFILE_INVALID.
    """
    layout = _distinct((request.nv_layout or NvLayout.TCG,), NvLayout, "NV layout")[0]
    default_eks = GCE_EK_ALGORITHMS if layout == NvLayout.GCE else DEFAULT_EK_ALGORITHMS
    ek_algorithms = _distinct(request.ek_algorithms or default_eks, KeyAlgorithm, "EK algorithm")
    ak_algorithm = _distinct((request.ak_algorithm or DEFAULT_AK_ALGORITHM,), _AK_ALGORITHMS, "AK algorithm")[0]
    by_name = {bank.hash_name: bank for bank in PcrBank}
    banks = _distinct(request.pcr_banks or tuple(bank.hash_name for bank in DEFAULT_PCR_BANKS), by_name, "PCR bank")
    return ProfileRecord(ek_algorithms, ak_algorithm, banks, layout)


def make_platform(asked: PlatformRecord, defaults: PlatformRecord) -> PlatformRecord:
    """Return the platform that is asked for, defaults filled in.

    Raises:
        InvalidArgumentError: CERTIFICATE_TEXT_INVALID.
    """
    return PlatformRecord(
        check_text(asked.manufacturer or defaults.manufacturer, "the platform's manufacturer"),
        check_text(asked.model or defaults.model, "the platform's model"),
        check_text(asked.version or defaults.version, "the platform's version"),
    )


def _distinct(values: Iterable[str], allowed: Iterable[str], what: str) -> tuple[str, ...]:
    order = [str(value) for value in allowed]
    given = [str(value) for value in values]
    for value in given:
        if value not in order:
            raise InvalidArgumentError("PROFILE_INVALID", f"{what} must be one of {', '.join(order)}", subject=value[:80])
    return tuple(value for value in order if value in given)


def fingerprint(request: CreateRequest, profile: ProfileRecord) -> bytes:
    """Return a digest that tells a retried request from another one under the same request_id."""
    content = [request.name, sorted(request.labels.items()), profile.ek_algorithms, profile.ak_algorithm, profile.pcr_banks]
    platform = request.platform
    identity = [profile.nv_layout, platform.manufacturer, platform.model, platform.version]
    return hashlib.sha256(json.dumps([*content, request.engine, *identity]).encode()).digest()
