"""The sealed setups: what environments bring along, readable only with the server's key and bound to their row."""

import msgspec

from fusevm.control.secrets import Sealer, load_secret, row_of
from fusevm.control.store.protocol import SealedRow, Secrets
from fusevm.model.errors import Internal
from fusevm.model.setup import Setup

_NAME = "setup"
_decode = msgspec.json.Decoder(Setup).decode
_encode = msgspec.json.Encoder().encode


class Vault:
    """Seals and opens the setups of environments."""

    def __init__(self, store: Secrets, sealer: Sealer) -> None:
        self._store = store
        self._sealer = sealer

    def seal(self, uid: str, setup: Setup) -> SealedRow:
        """The row to save with the environment. Raises NoEncryptionKey."""
        sealed = self._sealer.seal(_encode(setup).decode(), row=row_of(_owner(uid), _NAME))
        return SealedRow(_owner(uid), _NAME, sealed)

    async def load(self, uid: str) -> Setup:
        """The setup of a live environment. Raises Internal when there is none, BadSetting for another key."""
        text = await load_secret(self._store, self._sealer, _owner(uid), _NAME)
        if text is None:
            raise Internal(problem=f"the setup of {uid} is not in the store")
        return _decode(text)


def _owner(uid: str) -> str:
    return f"env:{uid}"
