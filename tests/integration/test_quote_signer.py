"""A quote is signed by the AK of its instance, whatever a guest with platform authorization does to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.conftest import Tool
from tests.integration.test_out_of_band import ak_of, check, quote
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError
from vtpm.tpm.keys import AK_HANDLE

Bind = Callable[[pb.Instance], Tool]

HANDLE = hex(AK_HANDLE)
ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign"


def replace_ak(run: Tool) -> None:
    """By a key that is an AK in all, but for its nameAlg: so it is another key."""
    run("tpm2_evictcontrol", "-C", "p", "-c", HANDLE)
    run(
        "tpm2_createprimary", "-C", "p", "-G", "ecc256:ecdsa-sha256:null", "-g", "sha384", "-a", ATTRIBUTES, "-c", "foreign.ctx"
    )
    run("tpm2_evictcontrol", "-C", "p", "-c", "foreign.ctx", HANDLE)
    run("tpm2_flushcontext", "-t")


@pytest.mark.parametrize("quoted_before", [True, False])
@pytest.mark.parametrize("asleep", [False, True])
def test_a_foreign_key_at_the_aks_handle_signs_nothing_that_leaves(
    daemon: DaemonProcess, name: str, tool: Bind, quoted_before: bool, asleep: bool
) -> None:
    daemon.create(name)
    instance = daemon.power_on(name, pb.STARTUP_NONE)
    run = tool(instance)
    run("tpm2_startup", "-c")
    if quoted_before:
        check(quote(daemon, name), ak_of(instance))
    replace_ak(run)
    if asleep:
        daemon.hibernate(name)
    for _ in range(2):
        with pytest.raises(VtpmError, match="another key than the instance's AK") as refused:
            quote(daemon, name)
        assert refused.value.reason == "AK_FOREIGN"
    # The remedy that the error names.
    run("tpm2_evictcontrol", "-C", "p", "-c", HANDLE)
    daemon.vtpm("instance", "stop", name)
    daemon.vtpm("instance", "start", name, "--startup", "clear")
    check(quote(daemon, name), ak_of(instance))


def test_a_key_that_left_its_tpm_is_not_even_tried(daemon: DaemonProcess, name: str, tool: Bind) -> None:
    daemon.create(name)
    run = tool(daemon.power_on(name, pb.STARTUP_NONE))
    run("tpm2_startup", "-c")
    run("tpm2_evictcontrol", "-C", "p", "-c", HANDLE)
    attributes = ATTRIBUTES.replace("|restricted", "")
    run("tpm2_createprimary", "-C", "p", "-G", "ecc:ecdsa", "-a", attributes, "-c", "foreign.ctx")
    run("tpm2_evictcontrol", "-C", "p", "-c", "foreign.ctx", HANDLE)
    with pytest.raises(VtpmError, match="no restricted signing key") as refused:
        quote(daemon, name)
    assert refused.value.reason == "AK_FOREIGN"
