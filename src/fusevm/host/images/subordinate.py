"""Subordinate user and group ids (subuid(5)): with them an ordinary user builds a system whose files have many owners.

Owns: reading the tables, and what to ask the administrator for. Must not: change them.
"""

import grp
import os
import pwd
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from fusevm.host.config import HostConfig

#: What a Debian system uses: ids up to nogroup's 65534, and -1.
NEEDED: Final = 65_536
#: SUB_UID_MIN of login.defs(5).
_FIRST: Final = 100_000
#: The tables, and the option of usermod(8) that adds a line.
_TABLES: Final = {Path("/etc/subuid"): "--add-subuids", Path("/etc/subgid"): "--add-subgids"}


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a table."""

    user: str
    ids: range


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """Why this user cannot build."""

    #: Where it shows.
    table: str
    problem: str
    #: A command for root; empty when there is none that helps.
    command: str


def find_shortage() -> Shortage | None:
    """Look whether this user has the ids that a build needs. Reads files: call it from a thread."""
    tables = {path: parse_grants(path.read_text()) if path.exists() else [] for path in _TABLES}
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        problem = f"user {os.geteuid()} has no name, and subordinate ids are given to names"
        return Shortage(table=str(next(iter(_TABLES))), problem=problem, command="")
    return judge(user, tables, _ids_in_use())


def parse_grants(text: str) -> list[Grant]:
    """Parse a table; what is no line of it is left out."""
    found = []
    for line in text.splitlines():
        words = line.split(":")
        if len(words) == 3 and words[1].isdecimal() and words[2].isdecimal():
            found.append(Grant(user=words[0], ids=range(int(words[1]), int(words[1]) + int(words[2]))))
    return found


def judge(user: str, tables: Mapping[Path, list[Grant]], in_use: Iterable[range]) -> Shortage | None:
    """Say what a user lacks, and the command that gives it: a range that nobody has. Pure.

    As for mmdebstrap, a user's first line counts, and a line for a number instead of a name does not.
    """
    counts = {table: _first_count(user, grants) for table, grants in tables.items()}
    short = [table for table, count in counts.items() if count is None or count < NEEDED]
    if not short:
        return None
    count = counts[short[0]]
    if count is not None:
        problem = (
            f"the first line for {user} gives {count} ids of the {NEEDED} that building an image without root needs"
        )
        # usermod adds lines at the end, where they do not count.
        return Shortage(table=str(short[0]), problem=problem, command="")
    first = find_free([*in_use, *(grant.ids for grants in tables.values() for grant in grants)])
    options = [f"{_TABLES[table]} {first}-{first + NEEDED - 1}" for table in short]
    problem = f"no line for {user}, which building an image without root needs"
    return Shortage(table=str(short[0]), problem=problem, command=" ".join(["usermod", *options, user]))


def find_free(taken: Iterable[range]) -> int:
    """Return the first of `NEEDED` numbers of which none is taken. Pure."""
    first = _FIRST
    for ids in sorted(taken, key=lambda ids: ids.start):
        if ids.start < first + NEEDED and ids.stop > first:
            first = ids.stop
    return first


def _first_count(user: str, grants: list[Grant]) -> int | None:
    return next((len(grant.ids) for grant in grants if grant.user == user), None)


def _ids_in_use() -> list[range]:
    """Ids of people and groups, and those that a host daemon gives to its machines."""
    people = [entry.pw_uid for entry in pwd.getpwall()] + [entry.gr_gid for entry in grp.getgrall()]
    config = HostConfig(data_root=Path("/"))
    # One below is the control plane's (`fuse up`), and one more below unpacks images (`confine`).
    machines = range(config.uid_base - 2, config.uid_base + config.uid_count)
    return [machines, *(range(number, number + 1) for number in people)]
