"""Trust between control plane and host daemon: a token that names the public key it may be sent to.

The daemon prints `<secret>.<sha256 of the DER SubjectPublicKeyInfo, hex>`. Whoever connects compares the fingerprint
before it sends the secret; there is no unverified mode and no certificate authority.
"""

import hashlib
import re

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fusevm.model.errors import BadSetting

_TOKEN = re.compile(r"(?P<secret>[\x21-\x7e]+)\.(?P<pin>[0-9a-fA-F]{64})")


def spki_sha256(certificate: bytes) -> str:
    """SHA-256 of the public key (DER SubjectPublicKeyInfo) in a DER certificate, as lower-case hex."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def parse_host_token(text: str) -> tuple[str, str]:
    """Split a printed token into (secret, fingerprint in lower case). Raises BadSetting."""
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        problem = "the token is not <secret>.<64 hex digits>; copy it as the host daemon printed it"
        raise BadSetting(setting="FIRECRACKER_TOKEN", problem=problem)
    return match["secret"], match["pin"].lower()
