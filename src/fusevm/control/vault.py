"""The sealed setups: what environments bring along, readable only with the server's key and bound to their row."""

import asyncio
from functools import lru_cache

import msgspec

from fusevm.control.secrets import Sealer, load_secret, row_of
from fusevm.control.store.protocol import SealedRow, Secrets
from fusevm.control.store.transactions import sealed_owner
from fusevm.core.redaction import Redactor
from fusevm.core.setup import secret_values
from fusevm.model.environment import Environment
from fusevm.model.errors import EnvironmentNotFound, Internal
from fusevm.model.setup import Setup

_NAME = "setup"
#: Characters of all values from which on a redactor takes more than a few milliseconds to make; the largest takes 0.2 s
#: and some 30 MB.
_MANY = 16 << 10
_made = lru_cache(maxsize=4)(Redactor)
_decode = msgspec.json.Decoder(Setup).decode
_encode = msgspec.json.Encoder().encode


class Vault:
    """Seals and opens the setups of environments."""

    def __init__(self, store: Secrets, sealer: Sealer) -> None:
        self._store = store
        self._sealer = sealer

    def seal(self, uid: str, setup: Setup) -> SealedRow:
        """The row to save with the environment. Raises NoEncryptionKey."""
        sealed = self._sealer.seal(_encode(setup).decode(), row=row_of(sealed_owner(uid), _NAME))
        return SealedRow(sealed_owner(uid), _NAME, sealed)

    async def load(self, uid: str) -> Setup:
        """The setup of a live environment. Raises Internal when there is none, BadSetting for another key."""
        setup = await self._find(uid)
        if setup is None:
            raise Internal(problem=f"the setup of {uid} is not in the store")
        return setup

    async def redactor(self, env: Environment) -> Redactor:
        """Masks what people must not read of what comes out of a live environment's guest.

        Raises EnvironmentNotFound when it has ended meanwhile, BadSetting for another key.
        """
        if not env.duties.setup:
            return Redactor()
        setup = await self._find(env.uid)
        if setup is None:
            raise EnvironmentNotFound(id=env.id)
        return await redactor_of(setup)

    async def _find(self, uid: str) -> Setup | None:
        text = await load_secret(self._store, self._sealer, sealed_owner(uid), _NAME)
        return _decode(text) if text is not None else None


async def redactor_of(setup: Setup) -> Redactor:
    """Masks the secret values of a setup. Many are sorted beside the event loop, and once while they are in use."""
    values = frozenset(secret_values(setup))
    return Redactor(values) if sum(map(len, values)) < _MANY else await asyncio.to_thread(_made, values)
