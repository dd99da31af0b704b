"""Values that must not be readable in the database: AES-256-GCM, the key's id in the blob, bound to their row.

| offset | size | field |
|---|---|---|
| 0 | 1 | version, 1 |
| 1 | 4 | key id: first bytes of SHA-256 of the key |
| 5 | 12 | nonce |
| 17 | n | ciphertext and tag |

The row (`owner/name`) is associated data: a blob moved to another row does not open. Rotation: what was sealed with a
previous key opens, and is sealed again with the present one when it is used, and in any case by the upkeep of the
server (`reseal_all`). With several replicas, a new key is first given to all of them as a previous one, and becomes the
present one in a second round.
"""

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fusevm.control.config import ControlConfig
from fusevm.control.store.location import MEMORY, is_postgres, sqlite_path
from fusevm.control.store.protocol import SealedRow
from fusevm.model.errors import BadSetting, NoEncryptionKey

log = structlog.get_logger()
_VERSION = b"\x01"
_KEY_BYTES = 32
_SETTING = "TOKEN_ENCRYPTION_KEY"
#: Rows that are sealed anew between two looks at the store.
BATCH = 100
#: Characters of base64 that version and key id fill.
_MARK = 6


class Sealer:
    """Seals with one key; opens with it and with those before it. Without a key it seals nothing."""

    def __init__(self, key: bytes | None, previous: Sequence[bytes] = ()) -> None:
        self._ciphers = {_id_of(known): AESGCM(known) for known in (*previous, *([key] if key else []))}
        self._key_id = _id_of(key) if key else b""

    def seal(self, text: str, *, row: str) -> str:
        """The sealed value as base64. Raises NoEncryptionKey."""
        if not self._key_id:
            raise NoEncryptionKey(what=row)
        nonce = secrets.token_bytes(12)
        sealed = self._ciphers[self._key_id].encrypt(nonce, text.encode(), row.encode())
        return base64.b64encode(_VERSION + self._key_id + nonce + sealed).decode()

    def open(self, sealed: str, *, row: str) -> str:
        """The value. Raises BadSetting when it was sealed with another key, or for another row."""
        blob = _decode(sealed, row)
        cipher = self._ciphers.get(blob[1:5])
        if blob[:1] != _VERSION or cipher is None:
            raise BadSetting(setting=_SETTING, problem=f"the secret {row} was sealed with another key")
        try:
            return cipher.decrypt(blob[5:17], blob[17:], row.encode()).decode()
        except InvalidTag as error:
            raise BadSetting(setting=_SETTING, problem=f"the secret {row} is damaged") from error

    @property
    def has_key(self) -> bool:
        """Can it seal?"""
        return bool(self._key_id)

    @property
    def mark(self) -> str:
        """How everything begins that was sealed with the present key, and (but for 4 bits of its id) nothing else."""
        return base64.b64encode(_VERSION + self._key_id).decode()[:_MARK]

    def is_current(self, sealed: str) -> bool:
        """Was it sealed with the present key?"""
        return not self._key_id or _decode(sealed, "")[1:5] == self._key_id


class Secrets(Protocol):
    """What `load_secret` needs of the store."""

    async def get_secret(self, owner: str, name: str) -> str | None:
        """The sealed value."""
        ...

    async def reseal_secret(self, owner: str, name: str, old: str, new: str) -> None:
        """Replace a sealed value that is still the old one."""
        ...


class AllSecrets(Secrets, Protocol):
    """What `reseal_all` needs of the store."""

    async def secrets_sealed_otherwise(self, mark: str, after: tuple[str, str], limit: int) -> list[SealedRow]:
        """Values that do not begin with `mark`, in the order of (owner, name), behind `after`."""
        ...


def row_of(owner: str, name: str) -> str:
    """What a sealed value is bound to."""
    return f"{owner}/{name}"


async def load_secret(store: Secrets, sealer: Sealer, owner: str, name: str) -> str | None:
    """A value of the store, opened; sealed anew if its key is no longer the present one. Raises BadSetting."""
    sealed = await store.get_secret(owner, name)
    if sealed is None:
        return None
    row = row_of(owner, name)
    text = sealer.open(sealed, row=row)
    if not sealer.is_current(sealed):
        await store.reseal_secret(owner, name, sealed, sealer.seal(text, row=row))
    return text


async def reseal_all(store: AllSecrets, sealer: Sealer) -> int:
    """Seal everything with the present key, used or not; how many values it was. What does not open stays as it is."""
    count, after = 0, ("", "")
    while sealer.has_key and (found := await store.secrets_sealed_otherwise(sealer.mark, after, BATCH)):
        for owner, name, sealed in ((row.owner, row.name, row.sealed) for row in found):
            after, row = (owner, name), row_of(owner, name)
            try:
                text = sealer.open(sealed, row=row)
            except BadSetting as error:
                log.warning("secret_not_resealed", row=row, problem=error.message, hint="see `fuse db check`")
                continue
            await store.reseal_secret(owner, name, sealed, sealer.seal(text, row=row))
            count += 1
    if count:
        log.info("secrets_resealed", count=count)
    return count


def open_sealer(config: ControlConfig) -> Sealer:
    """The sealer of a configuration. Raises BadSetting."""
    previous = [bytes.fromhex(key) for key in config.previous_keys]
    if is_postgres(config.database) and not config.encryption_key:
        return Sealer(None)
    return Sealer(load_key(config.encryption_key, sqlite_path(config.database)), previous)


def load_key(setting: str, database: str) -> bytes:
    """The key as set; else the one beside the database file, made (0600) when missing; in memory, a fresh one."""
    if setting:
        return bytes.fromhex(setting)
    if database == MEMORY:
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
        raise BadSetting(setting=_SETTING, problem=f"{path} does not hold 64 hex digits")
    return key


def _id_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()[:4]


def _decode(sealed: str, row: str) -> bytes:
    try:
        return base64.b64decode(sealed, validate=True)
    except binascii.Error as error:
        raise BadSetting(setting=_SETTING, problem=f"the secret {row} is damaged") from error
