"""Signatures of records, and whose of them count.

A signature is ed25519 (RFC 8032) over the record's JSON without its `signature`, keys sorted, no spaces,
non-ASCII escaped. The record names each file by its sha256, so all of the version is covered; and the
signature is a field of it, so that a version and its signature appear in one write.

It does not say which version an alias means, nor that no newer one was taken away, nor which catalog: whoever
may write the catalog can still move an alias to another signed version of the same adapter, and put there any
version that the same key has signed in another catalog. Use a key for each.
"""

import base64
import hashlib
import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_ft.catalog.record import AdapterRecord, Signature
from raytune_ft.errors import BadInput, CatalogError, StorageMissing
from raytune_ft.storage import disk_errors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNING_KEY = "RAYTUNE_SIGNING_KEY"
TRUSTED_KEYS = "RAYTUNE_TRUSTED_KEYS"
_PEM_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_PEM_BORDER = re.compile(r"-----[A-Z0-9 ]+-----")
_PEM_BEGIN = "-----BEGIN "
_SPKI_ED25519 = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of an ed25519 public key in DER (RFC 8410)."""
_PRIVATE_ED25519 = bytes.fromhex("06032b657004220420")
"""What stands before the 32 bytes of an ed25519 private key in DER (RFC 8410), without the lengths around."""
_PRIME = 2**255 - 19
_Y_OF_ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_Y_OF_SMALL_ORDER = frozenset({0, 1, _PRIME - 1, _Y_OF_ORDER_8, _PRIME - _Y_OF_ORDER_8})
"""The y of the eight points whose order divides 8; see `is_of_small_order`."""
_MAKE_KEY = "make one with: openssl genpkey -algorithm ed25519"


@dataclass(frozen=True)
class Signer:
    """Signs with an ed25519 key, which it never shows."""

    _key: "Ed25519PrivateKey"

    @classmethod
    def from_environment(cls) -> "Signer":
        """The signer whose key `RAYTUNE_SIGNING_KEY` holds.

        Raises:
            BadInput: there is none, or it is no ed25519 key in PEM without password.
        """
        place = f"{SIGNING_KEY} on {socket.gethostname()}"
        text = os.environ.get(SIGNING_KEY, "")
        if not text.strip():
            missing = "is empty" if SIGNING_KEY in os.environ else "is not set"
            raise BadInput(
                f"{place}: {missing}; it must hold the PEM text of an ed25519 private key; {_MAKE_KEY}"
            )
        return cls.from_pem(text, place)

    @classmethod
    def from_pem(cls, text: str, place: str) -> "Signer":
        """The signer of a private key in PEM.

        Args:
            text: the PEM, a secret that no message repeats.
            place: where it stood, for messages.

        Raises:
            BadInput: it is no ed25519 key in PEM without password.
        """
        # It takes 0.1 s to import, which only signatures need wait for.
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(text.encode(), password=None)
        except TypeError:
            raise BadInput(
                f"{place}: the key has a password, for which nobody can be asked here; remove it with: "
                "openssl pkey"
            ) from None
        except (ValueError, UnsupportedAlgorithm):
            raise BadInput(
                f"{place}: not the PEM text of a private key (nor is a file's name); {_MAKE_KEY}"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise BadInput(f"{place}: a key of another kind than ed25519; {_MAKE_KEY}")
        return cls(key)

    def __repr__(self) -> str:
        return f"Signer({fingerprint(self.public_key)})"

    @property
    def public_key(self) -> str:
        """The 32 bytes in hexadecimal digits, as a record holds them."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, content: bytes) -> Signature:
        """The signature of any bytes."""
        return Signature(public_key=self.public_key, value=self._key.sign(content).hex())

    def sign_record(self, record: AdapterRecord) -> AdapterRecord:
        """The same record with a signature in place of any that it had."""
        # As those who read it will have it: JSON may keep a value in another form.
        as_read = AdapterRecord.model_validate_json(record.to_bytes())
        return as_read.model_copy(update={"signature": self.sign(signed_bytes(as_read))})


@dataclass(frozen=True)
class Trust:
    """What is asked of a version's signature. One that is there must be valid, whosever it is."""

    keys: frozenset[str] = frozenset()
    """Public keys that are trusted, each 64 hexadecimal digits."""
    required: bool = False
    """Refuse versions that none of these keys has signed."""

    @classmethod
    def load(cls, files: Sequence[Path], *, required: bool) -> "Trust":
        """Trust the public keys of PEM files, or of `RAYTUNE_TRUSTED_KEYS` where no file is given.

        Raises:
            BadInput: a file or the variable holds anything else, or keys are required and none are given.
            StorageError: a file cannot be read, though it is there.
        """
        if files:
            keys = frozenset(key for path in files for key in _read_public_keys(path))
        elif TRUSTED_KEYS in os.environ:
            keys = parse_public_keys(os.environ[TRUSTED_KEYS], TRUSTED_KEYS)
        else:
            keys = frozenset()
        if required and not keys:
            raise BadInput(
                "a signature is required, and no key is trusted; name a file of public keys with "
                f"--trusted-keys, or set {TRUSTED_KEYS} to their PEM text"
            )
        return cls(keys, required)

    def check(self, record: AdapterRecord) -> None:
        """Refuse a version whose signature is not what is asked.

        Raises:
            CatalogError: it is not valid, or required and not by a trusted key.
        """
        problem = self.problem(record)
        if problem is not None:
            raise CatalogError(f"{record.reference}: {problem}")

    def problem(self, record: AdapterRecord) -> str | None:
        """Why a version is refused, or None."""
        signature = record.signature
        if signature is None:
            return (
                "has no signature, and one is required; publish it anew with publish.sign = true"
                if self.required
                else None
            )
        if is_of_small_order(signature.public_key):
            return "is signed by a key of small order, for which anybody can sign; publish it anew"
        if not is_valid(signature, signed_bytes(record)):
            return "its signature is not one of this record; the record was altered or damaged"
        if self.required and signature.public_key not in self.keys:
            return (
                f"is signed by {fingerprint(signature.public_key)}, which is none of the "
                f"{len(self.keys)} trusted keys; add that key if you trust it"
            )
        return None


def signed_bytes(record: AdapterRecord) -> bytes:
    """What the signature of a record that was read is over."""
    # Only what stood in its JSON: a later raytune-ft knows fields, with defaults, that were not signed. And
    # the values as they were understood, so that no other reading of the same bytes is vouched for.
    said = record.model_dump(mode="json", exclude={"signature"}, exclude_unset=True)
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def is_valid(signature: Signature, content: bytes) -> bool:
    """Whether the signature's key made it for these bytes; never by a key of small order."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if is_of_small_order(signature.public_key):
        return False
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.public_key))
    try:
        key.verify(bytes.fromhex(signature.value), content)
    except InvalidSignature:
        return False
    return True


def is_of_small_order(public_key: str) -> bool:
    """Whether a public key is one of the eight points for which signatures are made without a private key.

    Their encodings that are not the shortest count too: y as it is written may be the prime or more, and the
    sign of x, the topmost bit, says nothing here.
    """
    y = int.from_bytes(bytes.fromhex(public_key), "little") & (1 << 255) - 1
    return y % _PRIME in _Y_OF_SMALL_ORDER


def fingerprint(public_key: str) -> str:
    """Short name of a public key; `openssl pkey -pubin -outform DER | sha256sum` gives the same."""
    return f"sha256:{hashlib.sha256(_SPKI_ED25519 + bytes.fromhex(public_key)).hexdigest()}"


def parse_public_keys(text: str, place: str) -> frozenset[str]:
    """Public keys of PEM blocks, with anything between the blocks.

    Args:
        text: one block or several.
        place: where they stood, for messages.

    Raises:
        BadInput: there is no block, or one is no ed25519 public key.
    """
    blocks = list(_PEM_BLOCK.finditer(text))
    if not blocks:
        raise BadInput(
            f"{place}: holds no PEM text of a public key; make it with: openssl pkey -in KEY.pem -pubout"
        )
    if len(blocks) != text.count(_PEM_BEGIN):
        raise BadInput(f"{place}: one of its PEM blocks does not end; copy the keys again")
    return frozenset(
        _public_key(block[0], block[1], f"{place}: key {number}")
        for number, block in enumerate(blocks, start=1)
    )


def _read_public_keys(path: Path) -> frozenset[str]:
    try:
        with disk_errors(str(path)):
            content = path.read_bytes()
    except StorageMissing as error:
        raise BadInput(f"--trusted-keys {error}") from None
    return parse_public_keys(content.decode(errors="replace"), str(path))


def _public_key(pem: str, label: str, place: str) -> str:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if "PRIVATE KEY" in label or _holds_private_key(pem):
        raise BadInput(
            f"{place}: is a private key, which signs and must not be given to those who only verify; "
            "name the public one: openssl pkey -in KEY.pem -pubout"
        )
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise BadInput(f"{place}: not a public key; make it with: openssl pkey -pubout") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadInput(f"{place}: a public key of another kind than ed25519; {_MAKE_KEY}")
    public_key = key.public_bytes_raw().hex()
    if is_of_small_order(public_key):
        raise BadInput(f"{place}: a public key of small order, for which anybody can sign; {_MAKE_KEY}")
    return public_key


def _holds_private_key(pem: str) -> bool:
    """Whether a block holds an ed25519 private key, whatever it calls itself."""
    try:
        return _PRIVATE_ED25519 in base64.b64decode(_PEM_BORDER.sub("", pem))
    except ValueError:
        return False
