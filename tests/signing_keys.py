"""Keys as the PEM text in which the program reads them."""

from typing import Any

from cryptography.hazmat.primitives import serialization


def private_pem(key: Any, password: bytes | None = None) -> str:
    """A private key, of whatever kind."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password)
    form = serialization.PrivateFormat.PKCS8
    return str(key.private_bytes(serialization.Encoding.PEM, form, encryption).decode())


def public_pem(key: Any) -> str:
    """The public half of a private key."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(key.public_key().public_bytes(serialization.Encoding.PEM, form).decode())
