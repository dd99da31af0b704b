"""The SSH key that the host makes for a machine (RFC 8709)."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def make_host_key(entropy: bytes) -> tuple[str, str]:
    """Make an ed25519 key of 32 random bytes: OpenSSH's private format, and the public line without a comment."""
    key = Ed25519PrivateKey.from_private_bytes(entropy)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private.decode(), key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
