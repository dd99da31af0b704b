"""ETags: what an answer shows (RFC 9110 section 8.8.3). Pure.

`"key.revision"` where a revision has one rendering. A host's bookings and last answer change without a new revision:
its ETag is `"key.revision+digest of the body"`. They are strong; a proxy that compresses may mark them weak, which is
forgiven. If-None-Match compares all of it; If-Match protects what the revision stands for, and ignores the digest.
"""

import hashlib
import re

_TAG = re.compile(r'(?:W/)?("[^"]*")')


def etag_of(key: str, revision: int, body: bytes = b"") -> str:
    """The ETag of a record that never shares its key: an environment's uid, a host's id. `body`: see above."""
    digest = f"+{hashlib.sha256(body).hexdigest()[:16]}" if body else ""
    return f'"{key}.{revision}{digest}"'


def matches(header: str, etag: str) -> bool:
    """Does `If-None-Match` name this ETag? `*` names every one."""
    return header.strip() == "*" or etag in _TAG.findall(header)


def names_revision(header: str, key: str, revision: int) -> bool:
    """Does `If-Match` name this revision, whatever else was shown with it? `*` names every one."""
    without_digest = (tag.partition("+")[0].strip('"') for tag in _TAG.findall(header))
    return header.strip() == "*" or f"{key}.{revision}" in without_digest
