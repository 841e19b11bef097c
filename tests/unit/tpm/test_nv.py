"""NV entries as bytes; tpm2-tss reads the public areas. And what each layout puts where."""

from __future__ import annotations

import json
import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpm2_pytss.constants import TPMA_NV
from tpm2_pytss.types import TPM2B_NV_PUBLIC

from tests.unit.tpm.test_credential import EKS
from vtpm.errors import InvalidArgumentError
from vtpm.tpm import hcl, layouts, nv
from vtpm.tpm.keys import KeyAlgorithm, ak_template
from vtpm.tpm.layouts import NvLayout
from vtpm.tpm.nv import NvAttribute

INSTANCE = uuid.UUID(int=7)
EK_AND_AK = {
    ("EK", "RSA_2048"): b"ek",
    ("EK", "ECC_P384"): b"ek384",
    ("AK", "ECC_P256"): b"ak",
    ("PLATFORM", ""): b"platform",
}


def test_attributes_are_the_standard_s() -> None:
    for ours, theirs in (
        (NvAttribute.PP_WRITE, TPMA_NV.PPWRITE),
        (NvAttribute.OWNER_WRITE, TPMA_NV.OWNERWRITE),
        (NvAttribute.AUTH_WRITE, TPMA_NV.AUTHWRITE),
        (NvAttribute.POLICY_WRITE, TPMA_NV.POLICYWRITE),
        (NvAttribute.POLICY_DELETE, TPMA_NV.POLICY_DELETE),
        (NvAttribute.WRITE_LOCKED, TPMA_NV.WRITELOCKED),
        (NvAttribute.WRITE_ALL, TPMA_NV.WRITEALL),
        (NvAttribute.WRITE_DEFINE, TPMA_NV.WRITEDEFINE),
        (NvAttribute.WRITE_ST_CLEAR, TPMA_NV.WRITE_STCLEAR),
        (NvAttribute.GLOBAL_LOCK, TPMA_NV.GLOBALLOCK),
        (NvAttribute.PP_READ, TPMA_NV.PPREAD),
        (NvAttribute.OWNER_READ, TPMA_NV.OWNERREAD),
        (NvAttribute.AUTH_READ, TPMA_NV.AUTHREAD),
        (NvAttribute.POLICY_READ, TPMA_NV.POLICYREAD),
        (NvAttribute.NO_DA, TPMA_NV.NO_DA),
        (NvAttribute.ORDERLY, TPMA_NV.ORDERLY),
        (NvAttribute.CLEAR_ST_CLEAR, TPMA_NV.CLEAR_STCLEAR),
        (NvAttribute.READ_LOCKED, TPMA_NV.READLOCKED),
        (NvAttribute.WRITTEN, TPMA_NV.WRITTEN),
        (NvAttribute.PLATFORM_CREATE, TPMA_NV.PLATFORMCREATE),
        (NvAttribute.READ_ST_CLEAR, TPMA_NV.READ_STCLEAR),
    ):
        assert ours == int(theirs)


def test_a_definition_is_one_that_tpm2_tss_reads() -> None:
    entry = layouts.fixed_entry(0x01C00002, b"certificate")
    command = nv.define_command(entry, b"auth")
    public, _ = TPM2B_NV_PUBLIC.unmarshal(command[command.index(b"auth") + 4 :])
    area = public.nvPublic
    assert (area.nvIndex, area.dataSize, bytes(area.authPolicy)) == (0x01C00002, 11, b"")
    # The TPM refuses who asks for the state bits.
    assert int(area.attributes) == layouts.FIXED & ~(NvAttribute.WRITTEN | NvAttribute.WRITE_LOCKED)
    answer = bytes(10) + public.marshal()
    assert nv.parse_read_public(answer).index == 0x01C00002
    assert nv.parse_read_public(answer).size == 11


@given(st.integers(0, nv.MAX_NV_INDEX_SIZE))
def test_writes_and_reads_cover_all_in_parts(size: int) -> None:
    data = bytes(number % 251 for number in range(size))
    written = b""
    for command in nv.write_commands(0x01C00002, data, by=0x4000000C):
        length = struct.unpack_from(">H", command, 10 + 8 + 4 + 9)[0]
        assert struct.unpack(">H", command[-2:])[0] == len(written)
        assert length <= nv.NV_BUFFER_SIZE
        written += command[-2 - length : -2]
    assert written == data
    wanted = [struct.unpack(">HH", command[-4:]) for command in nv.read_commands(0x01C00002, size, by=0x01C00002)]
    assert sum(part for part, _ in wanted) == size
    assert [offset for _, offset in wanted] == list(range(0, size, nv.NV_BUFFER_SIZE))


@given(st.binary(max_size=30))
def test_cut_responses_are_refused_by_name(tail: bytes) -> None:
    for parse in (nv.parse_read, nv.parse_read_public):
        try:
            parse(bytes(10) + tail)
        except InvalidArgumentError as error:
            assert error.reason == "RESPONSE_MALFORMED"  # noqa: PT017  # both outcomes are right


def test_tcg_has_each_certificate_in_its_place() -> None:
    found = {entry.index: entry for entry in layouts.entries(NvLayout.TCG, INSTANCE, EK_AND_AK, {})}
    assert sorted(found) == [0x01C00002, 0x01C00016, 0x01C08000, 0x01C10002]
    assert found[0x01C00002].contents == b"ek"
    assert found[0x01C08000].locked
    ak = found[0x01C10002]
    assert ak.secret_auth
    assert not ak.locked
    assert ak.contents.rstrip(b"\0") == b"ak"
    assert len(ak.contents) > len(b"ak")


def test_azure_fits_into_an_index() -> None:
    _, public = EKS[KeyAlgorithm.RSA_2048]
    report = hcl.report(public, INSTANCE)
    assert len(report) <= nv.MAX_NV_INDEX_SIZE
    at = hcl.user_data_offset(report)
    assert at is not None
    changed = report[:at] + hcl.user_data_digits(b"\x0a" * 64) + report[at + 128 :]
    assert json.loads(changed[hcl.CLAIMS_OFFSET :])["user-data"] == "0A" * 64
    certificates = {("GUEST_AK", "RSA_2048"): b"guest"}
    entries = layouts.entries(NvLayout.AZURE, INSTANCE, certificates, {("GUEST_AK", "RSA_2048"): public})
    assert sorted(entry.index for entry in entries) == [0x01400001, 0x01400002, 0x01C101D0]


@pytest.mark.parametrize("contents", [b"", bytes(2048), b"HCLA" + bytes(2000)])
def test_what_is_no_report_is_left_alone(contents: bytes) -> None:
    assert hcl.user_data_offset(contents) is None


def test_gce_has_the_templates_beside_the_certificates() -> None:
    certificates = {("GUEST_AK", str(algorithm)): b"guest" for algorithm in layouts.AK_CERTIFICATES}
    found = {entry.index: entry for entry in layouts.entries(NvLayout.GCE, INSTANCE, certificates, {})}
    assert found[0x01C10001].contents == ak_template(KeyAlgorithm.RSA_2048)
    assert found[0x01C10003].contents == ak_template(KeyAlgorithm.ECC_P256)
    assert sorted(found) == [0x01C10000, 0x01C10001, 0x01C10002, 0x01C10003]
