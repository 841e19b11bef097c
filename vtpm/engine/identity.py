"""The seam's part about identity: a TPM that was just made and waits to be certified, and what goes into its NV."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vtpm.engine.v1 import link_pb2 as pb
from vtpm.store.model import KeyRecord
from vtpm.tpm.credential import Credential
from vtpm.tpm.keys import KeyAlgorithm, ObjectAttribute, parse_public
from vtpm.tpm.nv import NvEntry

# Sends a request to the worker of a TPM and returns its reply (vtpm.engine.worker_link.WorkerLink.request).
Request = Callable[[pb.WorkerRequest], Awaitable[pb.WorkerReply]]

GUEST_AK: Final = "GUEST_AK"


@dataclass(frozen=True, slots=True)
class TpmProperties:
    """TPM_PT_MANUFACTURER, the vendor strings together, TPM_PT_FIRMWARE_VERSION_1 and TPM_PT_REVISION, as the TPM tells."""

    manufacturer: int
    vendor: str
    firmware_version: int
    revision: int


@dataclass(frozen=True, slots=True)
class ExtraKey:
    """A signing key for the guest in the endorsement hierarchy; with handle 0 it is not kept, its template makes it again."""

    algorithm: KeyAlgorithm
    handle: int


@dataclass(frozen=True, slots=True)
class Challenge:
    """A credential for the key `ak`, encrypted to the key `ek`, both of the same TPM if it is what it should be."""

    ak: KeyRecord
    ek: KeyRecord
    credential: Credential


@dataclass(frozen=True, slots=True)
class TouchedKeys:
    """The keys that a running TPM has, and the commands (TPM_CC) since the generation that was last dealt with."""

    keys: tuple[KeyRecord, ...]
    ordinals: tuple[int, ...]
    generation: int


class HeldTpm:
    """A TPM without a guest, in a worker that waits for what its NV is to hold."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def activate(self, challenges: Sequence[Challenge]) -> list[bytes]:
        """Return the secret of each credential, as the TPM opens it (TPM2_ActivateCredential).

        Raises:
            TpmError: the TPM can't open one.
        """
        request = pb.WorkerRequest(activate_credentials=credentials_of(challenges))
        return list((await self._request(request)).activated_credentials.secrets)


class FreshTpm(HeldTpm):
    """A TPM that was just manufactured. Its keys are claims of its worker until they are proven (`activate`)."""

    def __init__(self, request: Request, made: pb.Manufactured) -> None:
        super().__init__(request)
        self.keys = key_records(made.keys)
        properties = made.properties
        self.properties = TpmProperties(
            properties.manufacturer, properties.vendor, properties.firmware_version, properties.revision
        )


# Says what is in the NV of a new TPM, or raises what makes the TPM not worth keeping.
Certify = Callable[[FreshTpm], Awaitable[Sequence[NvEntry]]]
# The same of a TPM that does not run just now: what of its NV is made anew.
Recertify = Callable[[HeldTpm], Awaitable[Sequence[NvEntry]]]


def key_records(keys: Sequence[pb.ManufacturedKey]) -> tuple[KeyRecord, ...]:
    """Return the keys of a reply."""
    return tuple(KeyRecord(key.role, key.algorithm, key.handle, key.tpmt_public) for key in keys)


def credentials_of(challenges: Sequence[Challenge]) -> pb.ActivateCredentials:
    """Return challenges for a request."""
    return pb.ActivateCredentials(credentials=[_credential(challenge) for challenge in challenges])


def _credential(challenge: Challenge) -> pb.Credential:
    # High range EKs may be used by their auth, low range EKs by their policy alone (EK Credential Profile 2.5, B.3 and B.4).
    by_policy = ObjectAttribute.USER_WITH_AUTH not in parse_public(challenge.ek.tpmt_public).attributes
    return pb.Credential(
        ak=challenge.ak.handle,
        ek=challenge.ek.handle,
        by_policy=by_policy,
        blob=challenge.credential.blob,
        encrypted_secret=challenge.credential.encrypted_secret,
        made_anew="" if challenge.ak.handle else challenge.ak.algorithm,
        ek_algorithm=challenge.ek.algorithm,
    )


def nv_entries(entries: Sequence[NvEntry]) -> list[pb.NvEntry]:
    """Return NV entries for a request."""
    return [
        pb.NvEntry(
            index=entry.index, attributes=entry.attributes, data=entry.data, size=entry.size, secret_auth=entry.secret_auth
        )
        for entry in entries
    ]
