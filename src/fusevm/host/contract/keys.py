"""Public SSH keys that users bring. Formats: RFC 4253, section 6.6 (blobs); sshd(8), AUTHORIZED_KEYS (lines)."""

from __future__ import annotations

import base64
import binascii
import itertools
import struct

from fusevm.model.errors import BadField

#: Lines of one kind, and bytes of one line.
_MAX_KEYS, _MAX_LINE = 128, 16 << 10
_KINDS = frozenset({
    *("ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
    *("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"),
})  # fmt: skip


def parse_keys(lines: list[str], field: str) -> tuple[str, ...]:
    """Check public keys, one a line, options before them allowed. Raises BadField: a bad line would lock people out."""
    if len(lines) > _MAX_KEYS:
        raise BadField(field=field, problem=f"at most {_MAX_KEYS} keys, not {len(lines)}")
    return tuple(_parse_key(line.strip(), f"{field}[{number}]") for number, line in enumerate(lines))


def _parse_key(line: str, field: str) -> str:
    if not line.isprintable() or not 0 < len(line) <= _MAX_LINE:
        raise BadField(field=field, problem=f"must be one line of 1 to {_MAX_LINE} printable characters")
    words = line.split()
    for kind, blob in itertools.pairwise(words):
        if kind in _KINDS and _is_blob(blob, kind):
            return line
    raise BadField(field=field, problem="is no public SSH key: `ssh-ed25519 AAAA... comment`")


def _is_blob(text: str, kind: str) -> bool:
    """Does the key's blob begin with its own kind?"""
    try:
        blob = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    name = kind.encode()
    return blob.startswith(struct.pack(">I", len(name)) + name) and len(blob) > 4 + len(name)
