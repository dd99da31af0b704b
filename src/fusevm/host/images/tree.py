"""The root file system that the layers of an image add up to, in memory: names, owners, modes, links, and where the
content of each file is kept. Pure.

Layers are applied in order (OCI image spec, "Applying changesets"). No path is ever looked up on this host: links are
followed inside of this tree, where `/` is the image's own root and `..` ends there. So whatever a layer says, it says
it about its own image.

Owns: what a layer may say, and what it means. Must not: read archives or write files.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final

from fusevm.host.images.tar_stream import TarEntry, TarKind

#: Of ext4 and of Linux: bytes of a name, of a path with its NUL, and of a link's target.
_MAX_NAME: Final = 255
_MAX_PATH: Final = 4095
#: Deeper than any real tree; Linux itself stops at the length of a path.
_MAX_DEPTH: Final = 200
#: As Linux.
_MAX_LINKS: Final = 40
_MAX_ID: Final = (1 << 32) - 2
#: ext4's own limit of names for one file.
_MAX_HARD_LINKS: Final = 65_000
_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
#: Other names of this kind are bookkeeping of the file system that layers were once made with.
_META: Final = b".wh..wh."
#: Attributes that are kept. Others mean something to the host that they came from (labels, ACLs in another form), or
#: to the overlay file system that machines mount the image with, which must not be told anything (trusted.overlay).
_XATTRS: Final = (b"security.capability", b"user.")
_MAX_XATTR: Final = 4096


class BadTree(Exception):
    """A layer says what cannot be followed exactly and safely; the text says which entry and why."""


class NodeKind(enum.Enum):
    """What a node is."""

    DIRECTORY = 0o040000
    FILE = 0o100000
    SYMLINK = 0o120000
    FIFO = 0o010000


class Node:
    """A file, directory, link or pipe. Several names may have the same one."""

    __slots__ = ("children", "content", "gid", "kind", "links", "mode", "mtime", "size", "target", "uid", "xattrs")

    def __init__(self, kind: NodeKind, mode: int, uid: int = 0, gid: int = 0, mtime: int = 0) -> None:
        self.kind = kind
        #: Without the type: 0o7777.
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.xattrs: dict[bytes, bytes] = {}
        #: Of a directory.
        self.children: dict[bytes, Name] = {}
        #: Of a symbolic link.
        self.target = b""
        #: Of a file: bytes, and the number under which its content is kept; -1: it has none.
        self.size = 0
        self.content = -1
        #: How many names it has.
        self.links = 1


class Name:
    """What a directory knows about one of its names."""

    __slots__ = ("layer", "node")

    def __init__(self, node: Node, layer: int) -> None:
        self.node = node
        #: The layer that named it last. Whiteouts hide what earlier layers named.
        self.layer = layer


class Tree:
    """The tree so far. `begin_layer`, then `apply` for each entry."""

    def __init__(self, max_entries: int) -> None:
        self.root = Node(NodeKind.DIRECTORY, 0o755)
        self._layer = -1
        self._max_entries = max_entries
        self._entries = 0

    def begin_layer(self) -> None:
        """What follows lies above everything so far."""
        self._layer += 1

    def apply(self, entry: TarEntry, content: int = -1) -> None:
        """Do what an entry says; `content` is the number of a file's content. Raises BadTree."""
        shown = _shown(entry.name)
        parts = split_name(entry.name)
        if not parts:
            if entry.kind is not TarKind.DIRECTORY:
                raise BadTree(f"the entry {shown} would replace the root directory")
            self._describe(self.root, entry)
            return
        self._count(shown)
        *above, base = parts
        way = self._enter(above, shown)
        if base == _OPAQUE:
            self._hide_lower(way[-1])
        elif base.startswith(_WHITEOUT):
            self._white_out(way[-1], base, shown)
        elif entry.kind not in (TarKind.CHARACTER, TarKind.BLOCK):
            self._put(way[-1], base, entry, content, shown)
        elif not self._is_in_dev(way):  # what is in /dev goes: the guest mounts its own
            raise BadTree(f"the entry {shown} is a {entry.kind.value}")

    def ensure_directory(self, path: bytes) -> None:
        """Make a directory, and those above it, where they are missing. Raises BadTree."""
        self._enter(split_name(path), _shown(path))

    def nodes(self) -> Iterator[Node]:
        """Every node once, directories before what is in them."""
        seen: set[int] = set()
        pending = [self.root]
        while pending:
            node = pending.pop()
            if id(node) not in seen:
                seen.add(id(node))
                yield node
                pending.extend(name.node for name in node.children.values())

    # -- names ------------------------------------------------------------------------------------------------------

    def _count(self, shown: str) -> None:
        self._entries += 1
        if self._entries > self._max_entries:
            raise BadTree(f"it has more than {self._max_entries} files (at {shown})")

    def _enter(self, parts: list[bytes], shown: str, *, make: bool = True) -> list[Node]:
        """The directories from the root to a path; links are followed within the image, what is missing is made."""
        stack = [self.root]
        pending = parts[::-1]
        links = 0
        while pending:
            part = pending.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":  # of a link's target; above the root there is only the root
                stack = stack[:-1] or stack
                continue
            name = stack[-1].children.get(part)
            if name is None:
                if not make:
                    raise BadTree(f"the entry {shown} is a link to what does not exist")
                self._count(shown)
                _check_part(part, shown)
                name = stack[-1].children[part] = Name(Node(NodeKind.DIRECTORY, 0o755), self._layer)
            node = name.node
            if node.kind is NodeKind.SYMLINK:
                links += 1
                if links > _MAX_LINKS:
                    raise BadTree(f"the entry {shown} lies behind too many symbolic links")
                stack = stack[:1] if node.target.startswith(b"/") else stack
                pending.extend(node.target.split(b"/")[::-1])
            elif node.kind is NodeKind.DIRECTORY:
                stack.append(node)
                if len(stack) > _MAX_DEPTH:
                    raise BadTree(f"the entry {shown[:200]} lies more than {_MAX_DEPTH} directories deep")
            else:
                raise BadTree(f"the entry {shown} lies below what is no directory")
        return stack

    def _put(self, parent: Node, base: bytes, entry: TarEntry, content: int, shown: str) -> None:
        _check_part(base, shown)
        old = parent.children.get(base)
        if entry.kind is TarKind.DIRECTORY and old is not None and old.node.kind is NodeKind.DIRECTORY:
            node = old.node
        elif entry.kind is TarKind.HARD_LINK:
            node = self._linked(entry.target, shown)
            if old is not None and old.node is node:
                return
            node.links += 1
            if node.links > _MAX_HARD_LINKS:
                raise BadTree(f"the entry {shown} is one of more than {_MAX_HARD_LINKS} hard links")
        else:
            node = _new_node(entry, content, shown)
        if entry.kind is not TarKind.HARD_LINK:
            self._describe(node, entry)
        if old is not None and old.node is not node:
            _unname(old.node)
        parent.children[base] = Name(node, self._layer)

    def _linked(self, target: bytes, shown: str) -> Node:
        parts = split_name(target)
        if not parts:
            raise BadTree(f"the entry {shown} is a hard link to the root directory")
        name = self._enter(parts[:-1], shown, make=False)[-1].children.get(parts[-1])
        if name is None:
            raise BadTree(f"the entry {shown} is a link to what does not exist")
        if name.node.kind is NodeKind.DIRECTORY:
            raise BadTree(f"the entry {shown} is a hard link to a directory")
        return name.node

    def _is_in_dev(self, way: list[Node]) -> bool:
        dev = self.root.children.get(b"dev")
        return len(way) > 1 and dev is not None and way[1] is dev.node

    def _describe(self, node: Node, entry: TarEntry) -> None:
        """Give a node the owner, mode, time and attributes of an entry."""
        if entry.uid > _MAX_ID or entry.gid > _MAX_ID:
            raise BadTree(f"the entry {_shown(entry.name)} belongs to {entry.uid}:{entry.gid}")
        if node.kind is not NodeKind.SYMLINK:
            node.mode = entry.mode
        node.uid, node.gid, node.mtime = entry.uid, entry.gid, entry.mtime
        node.xattrs = {key: value for key, value in entry.xattrs.items() if key.startswith(_XATTRS)}
        for key, value in node.xattrs.items():
            if len(value) > _MAX_XATTR or not key.isascii() or not key.decode().isprintable() or b" " in key:
                raise BadTree(f"an attribute of the entry {_shown(entry.name)} cannot be kept: {_shown(key)}")

    # -- whiteouts --------------------------------------------------------------------------------------------------

    def _white_out(self, parent: Node, base: bytes, shown: str) -> None:
        if base.startswith(_META):
            return
        hidden = base[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise BadTree(f"the entry {shown} hides nothing that has a name")
        name = parent.children.get(hidden)
        if name is None:
            return
        if name.node.kind is NodeKind.DIRECTORY:
            self._hide_lower(name.node)
        if name.layer < self._layer and not name.node.children:
            _unname(name.node)
            del parent.children[hidden]

    def _hide_lower(self, directory: Node) -> None:
        """Take away what earlier layers put below a directory; what this one put there stays."""
        for key, name in list(directory.children.items()):
            if name.node.kind is NodeKind.DIRECTORY:
                self._hide_lower(name.node)
            if name.layer < self._layer and not name.node.children:
                _unname(name.node)
                del directory.children[key]


def split_name(name: bytes) -> list[bytes]:
    """The parts of an entry's name, from the root of the image. Raises BadTree for one that leads anywhere else."""
    if b"\0" in name or len(name) > _MAX_PATH:
        raise BadTree(f"the name {_shown(name)} is too long, or holds a NUL")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise BadTree(f"the name {_shown(name)} leads out of its directory")
    return parts


def _check_part(part: bytes, shown: str) -> None:
    """Raise BadTree for what a directory of ours cannot name."""
    if len(part) > _MAX_NAME:
        raise BadTree(f"a part of the name {shown} is longer than {_MAX_NAME} bytes")
    if b"\n" in part or b"\r" in part:
        # Commands of the file system's maker are lines.
        raise BadTree(f"the entry {shown} has a line break in its name")


def _new_node(entry: TarEntry, content: int, shown: str) -> Node:
    match entry.kind:
        case TarKind.DIRECTORY:
            return Node(NodeKind.DIRECTORY, entry.mode)
        case TarKind.SYMLINK:
            node = Node(NodeKind.SYMLINK, 0o777)
            if not 0 < len(entry.target) <= _MAX_PATH or b"\0" in entry.target:
                raise BadTree(f"the symbolic link {shown} has no usable target")
            if b"\n" in entry.target or b"\r" in entry.target:
                raise BadTree(f"the symbolic link {shown} has a line break in its target")
            node.target, node.size = entry.target, len(entry.target)
            return node
        case TarKind.FIFO:
            return Node(NodeKind.FIFO, entry.mode)
        case _:
            node = Node(NodeKind.FILE, entry.mode)
            node.size, node.content = entry.size, content
            return node


def _unname(node: Node) -> None:
    """A node has lost a name; so has everything below it, if it is a directory."""
    pending = [node]
    while pending:
        one = pending.pop()
        one.links -= 1
        pending.extend(name.node for name in one.children.values())


def _shown(name: bytes) -> str:
    return repr(name[:200].decode(errors="replace"))
