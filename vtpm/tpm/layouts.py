"""Where a TPM's certificates are in NV, by whom they are looked for: the TCG's places, Azure's, Google Cloud's."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Mapping
from typing import Final

from vtpm.tpm import hcl
from vtpm.tpm.keys import KeyAlgorithm, ak_template
from vtpm.tpm.nv import MAX_NV_INDEX_SIZE, NvAttribute, NvEntry


class NvLayout(enum.StrEnum):
    """The layouts, by the names of vtpm.v1.NvLayout."""

    TCG = "TCG"
    AZURE = "AZURE"
    GCE = "GCE"


# TCG EK Credential Profile 2.5, 2.2.1.4 and 2.2.1.5; PC Client Platform TPM Profile, 4.6.
EK_CERTIFICATES: Final = {
    KeyAlgorithm.RSA_2048: 0x01C00002,
    KeyAlgorithm.ECC_P256: 0x01C0000A,
    KeyAlgorithm.ECC_P384: 0x01C00016,
    KeyAlgorithm.RSA_3072: 0x01C0001C,
}
PLATFORM_CERTIFICATE: Final = 0x01C08000
# No specification of the TCG has a place for the certificate of a service's AK. These are where Google Cloud's agents look.
AK_CERTIFICATES: Final = {KeyAlgorithm.RSA_2048: 0x01C10000, KeyAlgorithm.ECC_P256: 0x01C10002}

_COMMON: Final = NvAttribute.PLATFORM_CREATE | NvAttribute.WRITTEN | NvAttribute.OWNER_READ | NvAttribute.NO_DA
# Written once and for all, readable by everybody: what swtpm_setup --lock-nvram makes too.
FIXED: Final = (
    _COMMON
    | NvAttribute.AUTH_READ
    | NvAttribute.PP_READ
    | NvAttribute.PP_WRITE
    | NvAttribute.WRITE_DEFINE
    | NvAttribute.WRITE_LOCKED
)
# Written again while the guest runs, by an auth value that only the service knows; read by the owner.
RENEWED: Final = _COMMON | NvAttribute.AUTH_READ | NvAttribute.AUTH_WRITE | NvAttribute.PP_READ | NvAttribute.PP_WRITE
# Azure's numbers; the certificate's index has 4096 bytes there, and libtpms has none of more than 2048.
AZURE_AK_HANDLE: Final = 0x81000003
AZURE_AK_CERTIFICATE: Final = 0x01C101D0
AZURE_REPORT: Final = 0x01400001
AZURE_USER_DATA: Final = 0x01400002
_AZURE: Final = _COMMON | NvAttribute.AUTH_READ | NvAttribute.AUTH_WRITE
_AZURE_USER_DATA: Final = _AZURE | NvAttribute.OWNER_WRITE
# A certificate that is issued again has a signature of another length now and then.
_ROOM: Final = 64


def fixed_entry(index: int, data: bytes) -> NvEntry:
    """Return an index that is written once, just as large as its data."""
    return NvEntry(index, FIXED, data, size=len(data))


def renewed_entry(index: int, certificate: bytes) -> NvEntry:
    """Return an index whose certificate the service writes again; zeros follow it."""
    size = min(len(certificate) + _ROOM, MAX_NV_INDEX_SIZE)
    return NvEntry(index, RENEWED, certificate, size=size, secret_auth=True)


def entries(
    layout: NvLayout,
    instance: uuid.UUID,
    certificates: Mapping[tuple[str, str], bytes],
    publics: Mapping[tuple[str, str], bytes],
) -> list[NvEntry]:
    """Return what the NV of a new TPM holds.

    `certificates` are DER and `publics` TPMT_PUBLICs, by the role of the certified key and its algorithm. Roles are EK, AK,
    GUEST_AK, and PLATFORM with an empty algorithm.
    """
    found = []
    for (role, algorithm), der in certificates.items():
        match role:
            case "EK":
                found.append(fixed_entry(EK_CERTIFICATES[KeyAlgorithm(algorithm)], der))
            case "PLATFORM" if layout is NvLayout.TCG:
                found.append(fixed_entry(PLATFORM_CERTIFICATE, der))
            case _:
                found += renewed_entries(layout, role, algorithm, der)
    match layout:
        case NvLayout.AZURE:
            text = hcl.report(publics["GUEST_AK", KeyAlgorithm.RSA_2048], instance)
            found.append(NvEntry(AZURE_REPORT, _AZURE, text, size=MAX_NV_INDEX_SIZE, secret_auth=True))
            found.append(NvEntry(AZURE_USER_DATA, _AZURE_USER_DATA, b"", size=hcl.USER_DATA_SIZE))
        case NvLayout.GCE:
            found += [fixed_entry(index + 1, ak_template(algorithm)) for algorithm, index in AK_CERTIFICATES.items()]
    return found


def renewed_entries(layout: NvLayout, role: str, algorithm: str, der: bytes) -> list[NvEntry]:
    """Return what of a layout has a certificate that is renewed, DER."""
    match layout, role:
        case (NvLayout.TCG, "AK") | (NvLayout.GCE, "GUEST_AK"):
            return [renewed_entry(AK_CERTIFICATES[KeyAlgorithm(algorithm)], der)]
        case NvLayout.AZURE, "GUEST_AK":
            return [NvEntry(AZURE_AK_CERTIFICATE, _AZURE, der, size=MAX_NV_INDEX_SIZE, secret_auth=True)]
        case _:
            return []


def guest_aks(layout: NvLayout) -> Mapping[KeyAlgorithm, int]:
    """Return the AKs that a layout has besides the service's own: primary keys of the endorsement hierarchy, and their handles.

    With handle 0 the guest makes it from its template, which the service's own AKs have too.
    """
    match layout:
        case NvLayout.AZURE:
            return {KeyAlgorithm.RSA_2048: AZURE_AK_HANDLE}
        case NvLayout.GCE:
            return dict.fromkeys(AK_CERTIFICATES, 0)
        case _:
            return {}
