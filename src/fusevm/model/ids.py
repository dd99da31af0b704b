"""Identifiers: their grammars, and how they are made from a clock value and random bytes that the caller brings."""

import base64
import re

from fusevm.model.errors import BadField, BadTaskId

TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
#: Grammar of the host API; legal as jailer id, host name, path element and cgroup name.
MACHINE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ENVIRONMENT_PREFIX = "fuse-"
UID_BYTES = 16
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


def parse_task_id(text: str) -> str:
    """Return the task id unchanged, or raise BadTaskId."""
    if not TASK_ID.fullmatch(text):
        raise BadTaskId(task_id=text[:200])
    return text


def parse_machine_id(text: str) -> str:
    """Return the machine id unchanged, or raise BadField."""
    if not MACHINE_ID.fullmatch(text):
        raise BadField(
            field="machine_id",
            problem=f"{text[:80]!r} is not 1 to 63 of a-z, 0-9 and '-', starting with a letter or digit",
        )
    return text


def parse_published_port_id(text: str) -> str:
    """Return the id of a published port unchanged, or raise BadField."""
    if not TASK_ID.fullmatch(text):
        problem = f"{text[:80]!r} is not 1 to 128 of letters, digits, '.', '_' and '-', a letter or digit first"
        raise BadField(field="published_port_id", problem=problem)
    return text


def parse_snapshot_id(text: str) -> str:
    """Return the snapshot id of the host API unchanged, or raise BadField. The grammar is that of machine ids."""
    if not MACHINE_ID.fullmatch(text):
        raise BadField(
            field="snapshot_id",
            problem=f"{text[:80]!r} is not 1 to 63 of a-z, 0-9 and '-', starting with a letter or digit",
        )
    return text


def make_uid(now_ms: int, entropy: bytes) -> str:
    """Make an environment uid: 26 characters, ordered by time (ULID: 48 bits of milliseconds, 80 random bits)."""
    if len(entropy) < 10:
        raise ValueError("a uid needs 10 random bytes")
    value = (now_ms & ((1 << 48) - 1)) << 80 | int.from_bytes(entropy[:10], "big")
    return "".join(_CROCKFORD[(value >> shift) & 31] for shift in range(125, -1, -5))


def make_machine_id(entropy: bytes) -> str:
    """Make the id of one incarnation: `m-` and 26 base32 characters (16 random bytes)."""
    if len(entropy) != 16:
        raise ValueError("a machine id needs 16 random bytes")
    return "m-" + base64.b32encode(entropy).decode().rstrip("=").lower()


def environment_id(task_id: str) -> str:
    """The public id of the live environment of a task."""
    return ENVIRONMENT_PREFIX + task_id


def task_id_of(environment_id: str) -> str | None:
    """The task id in a public id, or None if it is no such id."""
    task_id = environment_id.removeprefix(ENVIRONMENT_PREFIX)
    if task_id == environment_id or not TASK_ID.fullmatch(task_id):
        return None
    return task_id
