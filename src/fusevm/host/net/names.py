"""Which names a machine may ask for, and how long their addresses hold. Pure.

Only questions for IPv4 addresses of allowed names leave the host. Other types of records (TXT, NULL, HTTPS ...) get
an empty answer: they are of no use without an address, and are what tunnels are made of.
"""

from enum import Enum, auto

from fusevm.host.net.dns_message import TYPE_A_CLASS_IN, Question
from fusevm.model.network import Network, Rule, matches_domain

#: Addresses of one answer that are passed on and pinned; more fit into no datagram.
MAX_ADDRESSES = 24
#: Seconds that an answer may be kept by the machine, whatever its owner says.
MAX_TTL_S = 300
#: An address stays reachable somewhat longer than its answer may be kept: programs look up first and connect later.
_GRACE_S = 15
_MIN_LIFETIME_S = 30


class Ruling(Enum):
    """What becomes of a question."""

    #: Not allowed: told so, and nobody else hears of it.
    REFUSE = auto()
    #: Goes on as it is.
    FORWARD = auto()
    #: Allowed, and there is nothing of that type.
    EMPTY = auto()
    #: Asked anew; the addresses are pinned before the machine learns them.
    PIN = auto()


def judge_question(policy: Network | None, question: Question) -> Ruling:
    """Decide about a question of a machine under a policy."""
    if policy is None:
        return Ruling.REFUSE
    if policy.internet:
        return Ruling.FORWARD
    if not matching_rules(policy, question):
        return Ruling.REFUSE
    return Ruling.PIN if question.type_and_class == TYPE_A_CLASS_IN else Ruling.EMPTY


def matching_rules(policy: Network | None, question: Question) -> tuple[Rule, ...]:
    """The domain rules that allow the name of a question."""
    name = question.text
    return tuple(rule for rule in policy.domain_rules if matches_domain(rule, name)) if policy is not None else ()


def bound_ttl(ttl: int) -> int:
    """Seconds that the machine may keep an answer."""
    return min(ttl, MAX_TTL_S)


def pin_lifetime(ttl: int) -> int:
    """Seconds that the addresses of an answer stay reachable."""
    return max(ttl + _GRACE_S, _MIN_LIFETIME_S)
