"""Who the daemon is on TCP: a self-signed certificate and a bearer token, made once and kept in the data directory.

    <data_root>/tls.pem   key and certificate (0600)
    <data_root>/token     `<secret>.<sha256 of the certificate's public key>` (0600): what clients are given

A client compares the key before it sends the secret (`wire.pin`), so no authority has to vouch for anybody.

Owns: the two files. Must not: serve.
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
import ssl
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fusevm.host.images.workspace import write_durably
from fusevm.model.errors import BadSetting
from fusevm.wire.pin import parse_host_token, spki_sha256

_SECRET_BYTES = 32
#: Nobody looks at the dates: trust is in the key.
_VALID_YEARS = 100
_NAME = "fuse-host"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's key and token."""

    pem: Path
    #: sha256 of the public key, hex.
    pin: str
    #: Bearer token that requests must carry.
    secret: str

    @property
    def token(self) -> str:
        """What is printed and given to clients."""
        return f"{self.secret}.{self.pin}"


def identity_files(data_root: Path) -> tuple[Path, Path]:
    """Where key and token of a data directory are."""
    return data_root / "tls.pem", data_root / "token"


def ensure_identity(data_root: Path) -> Identity:
    """Return the identity of a data directory, made if needed. Raises BadSetting for damaged files."""
    pem, token = identity_files(data_root)
    if not pem.exists():
        write_durably(pem, _make_pem(), mode=0o600)
    pin = spki_sha256(_load_certificate(pem))
    secret = _load_secret(token, pin) or secrets.token_urlsafe(_SECRET_BYTES)
    identity = Identity(pem=pem, pin=pin, secret=secret)
    if _read(token) != identity.token:
        write_durably(token, f"{identity.token}\n".encode(), mode=0o600)
    return identity


def make_ssl_context(identity: Identity) -> ssl.SSLContext:
    """TLS 1.2 or newer with our certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(identity.pem)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _make_pem() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=365 * _VALID_YEARS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME), x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private + certificate.public_bytes(Encoding.PEM)


def _load_certificate(pem: Path) -> bytes:
    try:
        return x509.load_pem_x509_certificate(pem.read_bytes()).public_bytes(Encoding.DER)
    except (OSError, ValueError) as e:
        problem = f"{pem} holds no certificate ({e}); remove it and give the new token to your control plane"
        raise BadSetting(setting="data_root", problem=problem) from e


def _load_secret(path: Path, pin: str) -> str:
    """The secret of a token that fits the certificate, else nothing."""
    text = _read(path)
    if not text:
        return ""
    try:
        secret, named = parse_host_token(text)
    except BadSetting:
        return ""
    return secret if named == pin else ""


def _read(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o077:
            os.chmod(path, 0o600)  # noqa: PTH101
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
