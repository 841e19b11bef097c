"""Numbers of the standard: command codes, response codes, tags, algorithms, handles (TPM 2.0 Library, Part 2, 6 and 7)."""

from __future__ import annotations

import enum
from typing import Final


class Tag(enum.IntEnum):
    """TPM_ST (Part 2, 6.9)."""

    NO_SESSIONS = 0x8001
    SESSIONS = 0x8002
    ATTEST_QUOTE = 0x8018


class AlgId(enum.IntEnum):
    """TPM_ALG_ID (Part 2, 6.3), those that this service names."""

    RSA = 0x0001
    SHA1 = 0x0004
    AES = 0x0006
    SHA256 = 0x000B
    SHA384 = 0x000C
    SHA512 = 0x000D
    NULL = 0x0010
    RSASSA = 0x0014
    ECDSA = 0x0018
    ECC = 0x0023
    CFB = 0x0043


class EccCurve(enum.IntEnum):
    """TPM_ECC_CURVE (Part 2, 6.4)."""

    NIST_P256 = 0x0003
    NIST_P384 = 0x0004


class Handle(enum.IntEnum):
    """TPM_RH (Part 2, 7.4)."""

    OWNER = 0x40000001
    NULL = 0x40000007
    PASSWORD = 0x40000009
    LOCKOUT = 0x4000000A
    ENDORSEMENT = 0x4000000B
    PLATFORM = 0x4000000C


class CommandCode(enum.IntEnum):
    """TPM_CC (Part 2, 6.5.2); member names are the command's without the TPM2_ prefix."""

    NV_UndefineSpaceSpecial = 0x11F
    EvictControl = 0x120
    HierarchyControl = 0x121
    NV_UndefineSpace = 0x122
    ChangeEPS = 0x124
    ChangePPS = 0x125
    Clear = 0x126
    ClearControl = 0x127
    ClockSet = 0x128
    HierarchyChangeAuth = 0x129
    NV_DefineSpace = 0x12A
    PCR_Allocate = 0x12B
    PCR_SetAuthPolicy = 0x12C
    PP_Commands = 0x12D
    SetPrimaryPolicy = 0x12E
    FieldUpgradeStart = 0x12F
    ClockRateAdjust = 0x130
    CreatePrimary = 0x131
    NV_GlobalWriteLock = 0x132
    GetCommandAuditDigest = 0x133
    NV_Increment = 0x134
    NV_SetBits = 0x135
    NV_Extend = 0x136
    NV_Write = 0x137
    NV_WriteLock = 0x138
    DictionaryAttackLockReset = 0x139
    DictionaryAttackParameters = 0x13A
    NV_ChangeAuth = 0x13B
    PCR_Event = 0x13C
    PCR_Reset = 0x13D
    SequenceComplete = 0x13E
    SetAlgorithmSet = 0x13F
    SetCommandCodeAuditStatus = 0x140
    FieldUpgradeData = 0x141
    IncrementalSelfTest = 0x142
    SelfTest = 0x143
    Startup = 0x144
    Shutdown = 0x145
    StirRandom = 0x146
    ActivateCredential = 0x147
    Certify = 0x148
    PolicyNV = 0x149
    CertifyCreation = 0x14A
    Duplicate = 0x14B
    GetTime = 0x14C
    GetSessionAuditDigest = 0x14D
    NV_Read = 0x14E
    NV_ReadLock = 0x14F
    ObjectChangeAuth = 0x150
    PolicySecret = 0x151
    Rewrap = 0x152
    Create = 0x153
    ECDH_ZGen = 0x154
    HMAC = 0x155
    Import = 0x156
    Load = 0x157
    Quote = 0x158
    RSA_Decrypt = 0x159
    HMAC_Start = 0x15B
    SequenceUpdate = 0x15C
    Sign = 0x15D
    Unseal = 0x15E
    PolicySigned = 0x160
    ContextLoad = 0x161
    ContextSave = 0x162
    ECDH_KeyGen = 0x163
    EncryptDecrypt = 0x164
    FlushContext = 0x165
    LoadExternal = 0x167
    MakeCredential = 0x168
    NV_ReadPublic = 0x169
    PolicyAuthorize = 0x16A
    PolicyAuthValue = 0x16B
    PolicyCommandCode = 0x16C
    PolicyCounterTimer = 0x16D
    PolicyCpHash = 0x16E
    PolicyLocality = 0x16F
    PolicyNameHash = 0x170
    PolicyOR = 0x171
    PolicyTicket = 0x172
    ReadPublic = 0x173
    RSA_Encrypt = 0x174
    StartAuthSession = 0x176
    VerifySignature = 0x177
    ECC_Parameters = 0x178
    FirmwareRead = 0x179
    GetCapability = 0x17A
    GetRandom = 0x17B
    GetTestResult = 0x17C
    Hash = 0x17D
    PCR_Read = 0x17E
    PolicyPCR = 0x17F
    PolicyRestart = 0x180
    ReadClock = 0x181
    PCR_Extend = 0x182
    PCR_SetAuthValue = 0x183
    NV_Certify = 0x184
    EventSequenceComplete = 0x185
    HashSequenceStart = 0x186
    PolicyPhysicalPresence = 0x187
    PolicyDuplicationSelect = 0x188
    PolicyGetDigest = 0x189
    TestParms = 0x18A
    Commit = 0x18B
    PolicyPassword = 0x18C
    ZGen_2Phase = 0x18D
    EC_Ephemeral = 0x18E
    PolicyNvWritten = 0x18F
    PolicyTemplate = 0x190
    CreateLoaded = 0x191
    PolicyAuthorizeNV = 0x192
    EncryptDecrypt2 = 0x193
    AC_GetCapability = 0x194
    AC_Send = 0x195
    Policy_AC_SendSelect = 0x196
    CertifyX509 = 0x197


def command_name(code: int) -> str:
    """Return a command code's name, such as `TPM2_PCR_Read`; an unknown code in hexadecimal."""
    try:
        return f"TPM2_{CommandCode(code).name}"
    except ValueError:
        return f"0x{code:08x}"


TPM_RC_SUCCESS: Final = 0x000
TPM_RC_INITIALIZE: Final = 0x100
TPM_RC_FAILURE: Final = 0x101
TPM_RC_COMMAND_SIZE: Final = 0x142
TPM_RC_COMMAND_CODE: Final = 0x143
TPM_RC_NV_SPACE: Final = 0x14B
TPM_RC_RETRY: Final = 0x922

# Format zero, version 1 (bit 8 set): errors, then warnings (bit 11 set). Part 2, 6.6.3.
_FORMAT_ZERO: Final = {
    0x100: "INITIALIZE", 0x101: "FAILURE", 0x103: "SEQUENCE", 0x10B: "PRIVATE", 0x119: "HMAC", 0x120: "DISABLED",
    0x121: "EXCLUSIVE", 0x124: "AUTH_TYPE", 0x125: "AUTH_MISSING", 0x126: "POLICY", 0x127: "PCR", 0x128: "PCR_CHANGED",
    0x12D: "UPGRADE", 0x12E: "TOO_MANY_CONTEXTS", 0x12F: "AUTH_UNAVAILABLE", 0x130: "REBOOT", 0x131: "UNBALANCED",
    0x142: "COMMAND_SIZE", 0x143: "COMMAND_CODE", 0x144: "AUTHSIZE", 0x145: "AUTH_CONTEXT", 0x146: "NV_RANGE",
    0x147: "NV_SIZE", 0x148: "NV_LOCKED", 0x149: "NV_AUTHORIZATION", 0x14A: "NV_UNINITIALIZED", 0x14B: "NV_SPACE",
    0x14C: "NV_DEFINED", 0x150: "BAD_CONTEXT", 0x151: "CPHASH", 0x152: "PARENT", 0x153: "NEEDS_TEST",
    0x154: "NO_RESULT", 0x155: "SENSITIVE",
    0x901: "CONTEXT_GAP", 0x902: "OBJECT_MEMORY", 0x903: "SESSION_MEMORY", 0x904: "MEMORY", 0x905: "SESSION_HANDLES",
    0x906: "OBJECT_HANDLES", 0x907: "LOCALITY", 0x908: "YIELDED", 0x909: "CANCELED", 0x90A: "TESTING",
    0x920: "NV_RATE", 0x921: "LOCKOUT", 0x922: "RETRY", 0x923: "NV_UNAVAILABLE", 0x97F: "NOT_USED",
}  # fmt: skip
_REFERENCES: Final = tuple(
    [f"REFERENCE_H{number}" for number in range(7)] + [""] + [f"REFERENCE_S{number}" for number in range(7)]
)

# Format one (bit 7 set): the low six bits. Part 2, 6.6.3.
_FORMAT_ONE: Final = {
    0x01: "ASYMMETRIC", 0x02: "ATTRIBUTES", 0x03: "HASH", 0x04: "VALUE", 0x05: "HIERARCHY", 0x07: "KEY_SIZE", 0x08: "MGF",
    0x09: "MODE", 0x0A: "TYPE", 0x0B: "HANDLE", 0x0C: "KDF", 0x0D: "RANGE", 0x0E: "AUTH_FAIL", 0x0F: "NONCE", 0x10: "PP",
    0x12: "SCHEME", 0x15: "SIZE", 0x16: "SYMMETRIC", 0x17: "TAG", 0x18: "SELECTOR", 0x1A: "INSUFFICIENT",
    0x1B: "SIGNATURE", 0x1C: "KEY", 0x1D: "POLICY_FAIL", 0x1F: "INTEGRITY", 0x20: "TICKET", 0x21: "RESERVED_BITS",
    0x22: "BAD_AUTH", 0x23: "EXPIRED", 0x24: "POLICY_CC", 0x25: "BINDING", 0x26: "CURVE", 0x27: "ECC_POINT",
}  # fmt: skip
_FORMAT_ONE_BIT: Final = 0x080
_PARAMETER_BIT: Final = 0x040
_SESSION_BIT: Final = 0x800


def response_code_name(rc: int) -> str:
    """Return a response code's name, such as `TPM_RC_VALUE (parameter 1)`; an unknown code in hexadecimal."""
    if rc == TPM_RC_SUCCESS:
        return "TPM_RC_SUCCESS"
    if rc & _FORMAT_ONE_BIT:
        name = _FORMAT_ONE.get(rc & 0x3F)
        if name is None or rc >> 12:
            return f"0x{rc:x}"
        number = rc >> 8 & 0xF
        if rc & _PARAMETER_BIT:
            where = f"parameter {number}"
        elif rc & _SESSION_BIT:
            where = f"session {number & 7}"
        else:
            where = f"handle {number}"
        return f"TPM_RC_{name} ({where})" if number & 7 or (rc & _PARAMETER_BIT and number) else f"TPM_RC_{name}"
    if 0x910 <= rc < 0x910 + len(_REFERENCES) and _REFERENCES[rc - 0x910]:
        return f"TPM_RC_{_REFERENCES[rc - 0x910]}"
    name = _FORMAT_ZERO.get(rc)
    return f"TPM_RC_{name}" if name else f"0x{rc:x}"
