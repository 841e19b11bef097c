"""A CA's key in a PKCS#11 token: an HSM, a smart card, SoftHSM. It is named by a URI (RFC 7512) and never leaves its token.

Which module is loaded and where the PIN is are settings of the daemon, not parts of the URI: who may ask the daemon to use a
key may not have it load a library. Needs the extra `pkcs11` (python-pkcs11).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key

from vtpm import files
from vtpm.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from vtpm.pki.signer import CaPublicKey, ca_public_key, signature_algorithm, signature_hash

PIN_VARIABLE: Final = "VTPM_CA_PKCS11_PIN"
_MAX_URI: Final = 1024
_MAX_PIN: Final = 256
_KNOWN: Final = frozenset({"token", "object", "id", "serial", "manufacturer", "model", "type"})


@dataclass(frozen=True, slots=True)
class TokenKey:
    """What a PKCS#11 URI names: `token` by label, or by `serial`; the key by label (`object`) or `id`."""

    uri: str
    token: str
    serial: bytes
    label: str
    identifier: bytes


def parse_uri(uri: str) -> TokenKey:
    """Read a PKCS#11 URI.

    Raises:
        InvalidArgumentError: PKCS11_URI_INVALID.
    """
    path, _, query = uri.partition("?")
    if not path.startswith("pkcs11:") or len(uri) > _MAX_URI or not uri.isprintable():
        raise _invalid("a PKCS#11 URI begins with `pkcs11:`, such as pkcs11:token=ca;object=issuing")
    if query:
        raise _invalid(
            "the URI must have no query: module and PIN are the daemon's settings ca_pkcs11_module and ca_pkcs11_pin_file"
        )
    parts: dict[str, bytes] = {}
    for part in filter(None, path.removeprefix("pkcs11:").split(";")):
        name, equals, value = part.partition("=")
        if not equals or name in parts or name not in _KNOWN:
            raise _invalid(f"the part {part[:40]!r} is unknown or there twice; known are {', '.join(sorted(_KNOWN))}")
        parts[name] = unquote_to_bytes(value)
    if not ("token" in parts or "serial" in parts) or not ("object" in parts or "id" in parts):
        raise _invalid("the URI must name a token (token= or serial=) and a key (object= or id=)")
    try:
        token, label = parts.get("token", b"").decode(), parts.get("object", b"").decode()
    except UnicodeDecodeError:
        raise _invalid("a label is UTF-8") from None
    return TokenKey(uri, token, parts.get("serial", b""), label, parts.get("id", b""))


def _invalid(message: str) -> InvalidArgumentError:
    return InvalidArgumentError("PKCS11_URI_INVALID", message, remedy="see docs/certificates.md")


def read_pin(pin_file: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the PIN: of the file, or of the environment variable VTPM_CA_PKCS11_PIN.

    Raises:
        FailedPreconditionError: PKCS11_PIN_MISSING or PKCS11_PIN_UNREADABLE.
    """
    value = (os.environ if environment is None else environment).get(PIN_VARIABLE, "")
    if pin_file:
        try:
            content = files.read(Path(pin_file), _MAX_PIN + 2, follow=True, trusted=True, owned=True)
            value = content.decode().removesuffix("\n").removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise FailedPreconditionError(
                "PKCS11_PIN_UNREADABLE",
                f"the PIN's file can't be read: {getattr(error, 'strerror', '') or 'it is no text'}",
                subject=pin_file,
                remedy=getattr(error, "remedy", "check ca_pkcs11_pin_file"),
            ) from None
    if not value or len(value) > _MAX_PIN:
        raise FailedPreconditionError(
            "PKCS11_PIN_MISSING",
            "the token's PIN is missing",
            subject=pin_file or PIN_VARIABLE,
            remedy=f"set ca_pkcs11_pin_file, or {PIN_VARIABLE} in the daemon's environment",
        )
    return value


# One for the whole process: a module is one library however many signers use it, and not every one takes two threads at once.
_TOKENS: Final = threading.Lock()


class Pkcs11Signer:
    """Implements Signer with a key in a token. One session, one signature at a time; it is opened again when it is lost.

    Raises:
        FailedPreconditionError: PKCS11_UNAVAILABLE (extra or setting missing), PKCS11_MODULE_FAILED, PKCS11_TOKEN_NOT_FOUND,
            PKCS11_KEY_NOT_FOUND, PKCS11_PIN_WRONG, PKCS11_PIN_MISSING or PKCS11_PIN_UNREADABLE.
        UnavailableError: PKCS11_FAILED, the token fails.
    """

    def __init__(self, module: str, uri: str, pin_file: str, public: CaPublicKey | None = None) -> None:
        self._module, self._where, self._pin_file = module, parse_uri(uri), pin_file
        self._lock = _TOKENS
        self._session: Any = None
        self._key: Any = None
        with self._lock, self._errors():
            self._open()
            self._public = public or self._read_public()
        self._public = ca_public_key(self._public, uri)
        self._algorithm = signature_algorithm(self._public)
        self._hash = signature_hash(self._public)
        self._prove()

    def __repr__(self) -> str:
        return f"Pkcs11Signer({self._where.uri!r})"

    @property
    def public_key(self) -> CaPublicKey:
        """See Signer."""
        return self._public

    @property
    def algorithm(self) -> bytes:
        """See Signer."""
        return self._algorithm

    def sign(self, data: bytes) -> bytes:
        """See Signer."""
        with self._lock, self._errors():
            if self._key is not None:
                try:
                    return self._sign(data)
                except Exception as error:  # a lost session has as many errors as there are tokens
                    if not self._lost(error):
                        raise
            self._open()
            return self._sign(data)

    def _sign(self, data: bytes) -> bytes:
        import pkcs11

        if isinstance(self._public, rsa.RSAPublicKey):
            return bytes(self._key.sign(data, mechanism=pkcs11.Mechanism.SHA384_RSA_PKCS))
        digest = hashes.Hash(self._hash)
        digest.update(data)
        # Tokens know ECDSA over a digest; not all know ECDSA with a hash of this size.
        raw = bytes(self._key.sign(digest.finalize(), mechanism=pkcs11.Mechanism.ECDSA))
        half = len(raw) // 2
        return encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))

    def _prove(self) -> None:
        """The token's key is the one of the certificate, or everything it signs would be worthless."""
        challenge = os.urandom(32)
        signature = self.sign(challenge)
        try:
            if isinstance(self._public, rsa.RSAPublicKey):
                self._public.verify(signature, challenge, padding.PKCS1v15(), self._hash)
            else:
                self._public.verify(signature, challenge, ec.ECDSA(self._hash))
        except Exception:  # noqa: BLE001  # whatever the way in which it does not fit
            raise InvalidArgumentError(
                "CA_KEY_MISMATCH",
                "the token's key is not the certificate's",
                subject=self._where.uri,
                remedy="name the key that this certificate certifies",
            ) from None

    # ---- the token -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            import pkcs11
        except ImportError:
            raise FailedPreconditionError(
                "PKCS11_UNAVAILABLE", "PKCS#11 needs python-pkcs11", remedy="pip install 'vtpm[pkcs11]'"
            ) from None
        if not self._module:
            raise FailedPreconditionError(
                "PKCS11_UNAVAILABLE",
                "no PKCS#11 module is configured",
                subject=self._where.uri,
                remedy="set ca_pkcs11_module to the token's library",
            )
        self._close()
        try:
            library = pkcs11.lib(self._module)
        except (pkcs11.PKCS11Error, RuntimeError, OSError):
            raise self._failed("PKCS11_MODULE_FAILED", f"the module {self._module!r} can't be loaded") from None
        named = {"token_label": self._where.token or None, "token_serial": self._where.serial or None}
        token = library.get_token(**{key: value for key, value in named.items() if value})
        try:
            self._session = token.open(user_pin=read_pin(self._pin_file))
        except pkcs11.UserAlreadyLoggedIn:
            # A login is the whole process's: another signer has a key in the same token.
            self._session = token.open()
        self._key = self._find(pkcs11.ObjectClass.PRIVATE_KEY)

    def _find(self, kind: Any) -> Any:
        wanted = {"object_class": kind, "label": self._where.label or None, "id": self._where.identifier or None}
        return self._session.get_key(**{key: value for key, value in wanted.items() if value is not None})

    def _read_public(self) -> CaPublicKey:
        import pkcs11
        from pkcs11.util.ec import encode_ec_public_key
        from pkcs11.util.rsa import encode_rsa_public_key

        public = self._find(pkcs11.ObjectClass.PUBLIC_KEY)
        if public.key_type is pkcs11.KeyType.EC:
            return load_der_public_key(encode_ec_public_key(public))  # type: ignore[return-value]
        return load_der_public_key(encode_rsa_public_key(public))  # type: ignore[return-value]

    def _close(self) -> None:
        session, self._session, self._key = self._session, None, None
        if session is not None:
            with contextlib.suppress(Exception):
                session.close()

    @staticmethod
    def _lost(error: Exception) -> bool:
        import pkcs11

        lost = (
            pkcs11.SessionHandleInvalid,
            pkcs11.SessionClosed,
            pkcs11.UserNotLoggedIn,
            pkcs11.TokenNotPresent,
            pkcs11.DeviceRemoved,
            pkcs11.DeviceError,
            pkcs11.ObjectHandleInvalid,
        )
        return isinstance(error, lost)

    @contextlib.contextmanager
    def _errors(self) -> Any:
        try:
            import pkcs11
        except ImportError:
            yield
            return
        try:
            yield
        except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange, pkcs11.PinLocked) as error:
            raise self._failed("PKCS11_PIN_WRONG", f"the token refuses the PIN ({type(error).__name__})") from None
        except (pkcs11.NoSuchToken, pkcs11.MultipleTokensReturned):
            raise self._failed("PKCS11_TOKEN_NOT_FOUND", "there is no such token, or there are several") from None
        except (pkcs11.NoSuchKey, pkcs11.MultipleObjectsReturned):
            raise self._failed("PKCS11_KEY_NOT_FOUND", "the token has no such key, or has several") from None
        except pkcs11.PKCS11Error as error:
            self._close()
            raise UnavailableError(
                "PKCS11_FAILED", f"the token fails ({type(error).__name__})", subject=self._where.uri, remedy="check the token"
            ) from None

    def _failed(self, reason: str, message: str) -> FailedPreconditionError:
        return FailedPreconditionError(
            reason,
            message,
            subject=self._where.uri,
            remedy="check the URI, ca_pkcs11_module and ca_pkcs11_pin_file",
        )
