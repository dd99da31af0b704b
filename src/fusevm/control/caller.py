"""Who sends a request, once the gate has let it in."""

import msgspec

from fusevm.model.errors import ScopeMissing
from fusevm.wire.routes import Scope


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The rights of one request."""

    #: Whose environments it sees and makes; empty: it sees everybody's and makes nobody's.
    tenant: str = ""
    #: As in the route table; `admin` implies all.
    scopes: tuple[str, ...] = ()
    #: `ak_...`; empty for the master token, and where no token is asked for.
    key_id: str = ""
    #: The public part of its key, by which the key is found again.
    key_prefix: str = ""
    #: When its session ends; None: there is none, or nothing is known of an end.
    ends_at_ms: int | None = None
    #: The master token was sent, or none is needed.
    is_master: bool = False

    @property
    def sees(self) -> str | None:
        """The tenant whose objects are shown, as store queries take it; None: everybody's."""
        return self.tenant or None

    def may_see(self, tenant: str) -> bool:
        """May it know of an object of this tenant?"""
        return self.tenant in ("", tenant)

    def may(self, scope: Scope) -> bool:
        """Does it have this right?"""
        return self.is_master or scope is Scope.OPEN or Scope.ADMIN in self.scopes or scope in self.scopes

    def require(self, scope: Scope) -> None:
        """Raises ScopeMissing."""
        if not self.may(scope):
            raise ScopeMissing(scope=scope.value)


#: The master token, or a server without one.
MASTER = Caller(scopes=(Scope.ADMIN,), is_master=True)
#: Routes that need no key.
ANYONE = Caller()
