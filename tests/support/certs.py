"""An instance's certificates by the API, and the CA that they end at."""

from __future__ import annotations

from cryptography import x509

from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import certificate_pb2 as pb


def certificates(daemon: DaemonProcess, instance: str, *, history: bool = False) -> dict[tuple[str, str], pb.Certificate]:
    """What is in force, by kind and algorithm; with `history` the oldest that is recorded."""
    request = pb.ListCertificatesRequest(instance=instance, history=history)
    return {(item.kind, item.algorithm): item for item in daemon.client.certificates.ListCertificates(request).certificates}


def chain(daemon: DaemonProcess) -> list[x509.Certificate]:
    """The CA in force: the issuing CA's certificate first."""
    authority = daemon.client.certificates.GetAuthority(pb.GetAuthorityRequest()).authorities[0]
    return [x509.load_pem_x509_certificate(pem.encode()) for pem in authority.chain]


def revoked_serials(daemon: DaemonProcess) -> set[int]:
    """What the CRL in force names."""
    crl = x509.load_der_x509_crl(daemon.client.certificates.GetCrl(pb.GetCrlRequest()).crl)
    return {item.serial_number for item in crl}
