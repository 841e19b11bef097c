"""Part of the composition root: the certificate authority from the settings, and its distribution points."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from typing import Final

import structlog

from vtpm.config import Settings
from vtpm.errors import VtpmError
from vtpm.instance.authority import AuthorityOptions, HostAuthority
from vtpm.instance.certificates import CertificateDesk
from vtpm.instance.creation import Creation, Wanted
from vtpm.instance.identity import Identity, IdentityMetrics
from vtpm.instance.keeper import IdentityKeeper
from vtpm.instance.lifecycle import Lifecycle
from vtpm.instance.manager import InstanceManager
from vtpm.instance.model import CreateRequest
from vtpm.instance.pool import InstancePool
from vtpm.instance.renewal import Renewal
from vtpm.instance.validation import make_profile
from vtpm.pki.model import IssuingPolicy
from vtpm.seal.keys import KeyProvider
from vtpm.store.model import PlatformRecord
from vtpm.store.store import Store
from vtpm.wire.pki_http import DistributionServer

log: Final = structlog.get_logger("vtpm.certification")

_UPKEEP_INTERVAL_S: Final = 3600.0


def authority_options(settings: Settings) -> AuthorityOptions:
    """Return what the settings say of the CA."""
    policy = IssuingPolicy(
        base_url=settings.pki_base_url,
        trust_domain=settings.ca_trust_domain,
        ek_lifetime=dt.timedelta(days=settings.ca_ek_lifetime_days),
        ak_lifetime=dt.timedelta(hours=settings.ca_ak_lifetime_hours),
        crl_lifetime=dt.timedelta(hours=settings.ca_crl_lifetime_hours),
        policy_oid=settings.ca_policy_oid,
        policy_uri=settings.ca_policy_uri,
    )
    return AuthorityOptions(settings.ca, settings.ca_name, policy, settings.ca_pkcs11_module, settings.ca_pkcs11_pin_file)


async def open_desk(
    settings: Settings, store: Store, keys: KeyProvider, stack: contextlib.AsyncExitStack
) -> CertificateDesk | None:
    """Open the CA and serve its distribution points until `stack` unwinds; None where there is no CA (ca = none).

    Raises:
        VtpmError: the CA can't be used, or the address; nothing was changed.
    """
    if settings.ca == "none":
        return None
    authority = await asyncio.to_thread(HostAuthority.open, store, keys, authority_options(settings))
    desk = CertificateDesk(store, authority)
    if settings.pki_http_address:
        server = DistributionServer(settings.pki_http_address, desk.published)
        await server.start()
        stack.push_async_callback(server.close)
    upkeep = asyncio.get_running_loop().create_task(_upkeep(desk))
    stack.callback(upkeep.cancel)
    return desk


def look_after_identities(
    lifecycle: Lifecycle,
    settings: Settings,
    metrics: IdentityMetrics,
    desk: CertificateDesk | None,
) -> Creation:
    """Have instances certified and their keys watched from now on; return what makes TPMs."""
    platform = PlatformRecord(settings.platform_manufacturer, settings.platform_model, settings.platform_version)
    identity = Identity(
        lambda: desk.authority.current if desk is not None else None,
        lambda key_id: desk.authority.issuer_certificate(key_id) if desk is not None else None,
        metrics,
        platform,
    )
    lifecycle.look_after(IdentityKeeper(lifecycle, identity), Renewal(lifecycle, identity))
    return Creation(lifecycle, identity)


async def begin_upkeep(
    manager: InstanceManager,
    lifecycle: Lifecycle,
    creation: Creation,
    settings: Settings,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Renew what is due and keep TPMs of the default profile ready until `stack` unwinds.

    With pool_size = 0 those that are left are destroyed.
    """
    if lifecycle.renewal is not None:
        lifecycle.renewal.start()
        stack.push_async_callback(lifecycle.renewal.close)
    wanted = Wanted("", {}, settings.default_engine, make_profile(CreateRequest()), creation.identity.platform)
    pool = InstancePool(lifecycle, creation, size=settings.pool_size, wanted=wanted)
    await pool.start()
    stack.push_async_callback(pool.close)
    manager.pool = pool


async def _upkeep(desk: CertificateDesk) -> None:
    """Forget from time to time what no CRL needs to name any more."""
    while True:
        await asyncio.sleep(_UPKEEP_INTERVAL_S)
        try:
            forgotten = await asyncio.to_thread(desk.forget_expired)
            log.debug("certificates.forgotten", count=forgotten)
        except VtpmError as error:
            log.warning("certificates.upkeep_failed", reason=error.reason)
        except Exception as error:  # noqa: BLE001  # the next time is another
            log.error("certificates.upkeep_failed", reason="INTERNAL", error=type(error).__name__)
