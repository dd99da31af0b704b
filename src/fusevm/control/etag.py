"""ETags: which revision of a record an answer shows (RFC 9110 section 8.8.3). Pure.

Strong, since a revision has one rendering; a proxy that compresses may mark it weak, which is forgiven.
"""

import re

_TAG = re.compile(r'(?:W/)?("[^"]*")')


def etag_of(key: str, revision: int) -> str:
    """The ETag of a record that never shares its key: an environment's uid, a host's id."""
    return f'"{key}.{revision}"'


def matches(header: str, etag: str) -> bool:
    """Does `If-Match` or `If-None-Match` name this ETag? `*` names every one."""
    return header.strip() == "*" or etag in _TAG.findall(header)
