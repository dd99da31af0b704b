"""Values that must not be readable in the database: AES-256-GCM, the key's id in the blob, bound to their row.

| offset | size | field |
|---|---|---|
| 0 | 1 | version, 1 |
| 1 | 4 | key id: first bytes of SHA-256 of the key |
| 5 | 12 | nonce |
| 17 | n | ciphertext and tag |

The row (`owner/name`) is associated data: a blob moved to another row does not open.
"""

import base64
import binascii
import hashlib
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fusevm.model.errors import BadSetting

_VERSION = b"\x01"
_KEY_BYTES = 32


class Sealer:
    """Seals and opens values with one key."""

    def __init__(self, key: bytes) -> None:
        self._key_id = hashlib.sha256(key).digest()[:4]
        self._cipher = AESGCM(key)

    def seal(self, text: str, *, row: str) -> str:
        """The sealed value as base64."""
        nonce = secrets.token_bytes(12)
        return base64.b64encode(
            _VERSION + self._key_id + nonce + self._cipher.encrypt(nonce, text.encode(), row.encode())
        ).decode()

    def open(self, sealed: str, *, row: str) -> str:
        """The value. Raises BadSetting when it was sealed with another key, or for another row."""
        try:
            blob = base64.b64decode(sealed, validate=True)
        except binascii.Error as error:
            raise BadSetting(setting="TOKEN_ENCRYPTION_KEY", problem=f"the secret {row} is damaged") from error
        if blob[:5] != _VERSION + self._key_id:
            raise BadSetting(setting="TOKEN_ENCRYPTION_KEY", problem=f"the secret {row} was sealed with another key")
        try:
            return self._cipher.decrypt(blob[5:17], blob[17:], row.encode()).decode()
        except InvalidTag as error:
            raise BadSetting(setting="TOKEN_ENCRYPTION_KEY", problem=f"the secret {row} is damaged") from error


def load_key(setting: str, database: str) -> bytes:
    """The key as set; else the one beside the database file, made (0600) when missing; in memory, a fresh one."""
    if setting:
        return bytes.fromhex(setting)
    if database == ":memory:":
        return secrets.token_bytes(_KEY_BYTES)
    path = Path(database + ".key")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        text = path.read_text().strip()
    except OSError as error:
        raise BadSetting(setting="database", problem=f"cannot write the key file {path}: {error}") from error
    else:
        text = secrets.token_hex(_KEY_BYTES)
        with os.fdopen(fd, "w") as file:
            file.write(text + "\n")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise BadSetting(setting="TOKEN_ENCRYPTION_KEY", problem=f"{path} does not hold 64 hex digits")
    return key
