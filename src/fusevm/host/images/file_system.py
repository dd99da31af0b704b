"""Write an ext4 file system from a tree in memory and numbered files of content: a script for debugfs(8). Pure but for
`write_file_system`.

No file of the image ever exists on this host under its own name, with its own owner or mode: content lies in files
named by numbers, everything else is words in a script. So nothing is followed, executed or trusted on the way, the
result needs no root, and the same tree gives the same bytes.

Owns: the script and its order. Must not: read layers.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Final

import msgspec

from fusevm.host.images.confine import without_rights
from fusevm.host.images.ext4 import EPOCH_S, Extent, blank_words, estimate_bytes, is_too_small
from fusevm.host.images.tree import BadTree, Node, NodeKind, Tree
from fusevm.host.run import run
from fusevm.model.errors import CommandFailed

#: debugfs reads its script through a buffer of BUFSIZ bytes; a longer line would be taken for two (debugfs.c).
_MAX_LINE: Final = 8000
#: What mke2fs makes in every root directory.
_LOST_AND_FOUND: Final = b"/lost+found"
_MAX_TIME: Final = (1 << 31) - 1
_BLOCK: Final = 4096
_FAST_SYMLINK: Final = 60
_TIMEOUT_S: Final = 3600.0
_GROWTH_ATTEMPTS: Final = 4
CONTENT: Final = "content"


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a file system of an empty one."""

    #: Commands of debugfs(8), one a line.
    commands: bytes
    #: Values of extended attributes: `content/x<index>`.
    attributes: list[bytes]


def render_script(tree: Tree) -> Script:
    """The commands that fill an empty file system, in an order that depends on the tree alone. Raises BadTree."""
    draft = _Draft()
    draft.add_children(tree.root, b"")
    draft.add_attributes(tree.root, b'"/"')
    for line in draft.lines:
        if len(line) > _MAX_LINE or b"\n" in line or b"\r" in line or b"\0" in line:
            raise BadTree(f"a path of it is too long: {line[:80]!r}")
    return Script(commands=b"\n".join(draft.lines) + b"\n", attributes=draft.attributes)


def measure_tree(tree: Tree) -> Extent:
    """How much room the tree needs."""
    inodes, total = 0, _BLOCK
    for node in tree.nodes():
        inodes += 1
        if node.kind is NodeKind.DIRECTORY:
            # 8 bytes and the name per entry, rounded up; half-empty blocks after splits.
            names = sum(12 + len(key) for key in node.children)
            total += _BLOCK * (1 + names * 3 // 2 // _BLOCK)
        elif node.kind is NodeKind.FILE or node.size >= _FAST_SYMLINK:
            total += -(-node.size // _BLOCK) * _BLOCK
        total += _BLOCK if node.xattrs else 0
    return Extent(inodes=inodes, bytes=total)


async def write_file_system(folder: Path, extent: Extent) -> int:
    """Make `rootfs.ext4` in a workplace from its `script` and `content`; its size. Raises CommandFailed, NoSpace."""
    size = estimate_bytes(extent)
    target = folder / "rootfs.ext4"
    for attempt in range(_GROWTH_ATTEMPTS):
        await asyncio.to_thread(target.unlink, missing_ok=True)
        await _run_quietly(folder, blank_words(target.name, size, extent.inodes))
        said = await _run_quietly(folder, ["debugfs", "-w", "-f", "script", target.name])
        problem = next((line for line in said.splitlines() if line and not line.startswith("debugfs 1.")), "")
        if not problem:
            break
        if attempt == _GROWTH_ATTEMPTS - 1 or not is_too_small(problem):
            raise CommandFailed(command="debugfs -w -f script rootfs.ext4", exit_status=0, stderr=problem)
        size = -(-size * 5 // 4 // _BLOCK) * _BLOCK
    await _run_quietly(folder, ["e2fsck", "-f", "-n", target.name])
    # mke2fs leaves out a last block group that would be too small.
    return (await asyncio.to_thread(target.lstat)).st_size


async def _run_quietly(folder: Path, words: list[str]) -> str:
    """Run a tool as the worker in its workplace; what it said on stderr. Its stdout repeats the script."""
    quiet: list[str | Path] = ["sh", "-c", 'exec "$@" >/dev/null', "sh", *words]
    env = {"E2FSPROGS_FAKE_TIME": str(EPOCH_S)}
    done = await run(without_rights(quiet), timeout_s=_TIMEOUT_S, cwd=folder, env=env)
    return done.stderr.decode(errors="replace")


def take_file(source: Path, target: Path) -> None:
    """Move a file out of the worker's hands: a plain file with one name, from now on its owner's. Raises OSError."""
    fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise OSError(f"{source} is no plain file")
        if os.geteuid() == 0:
            os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o444)
    finally:
        os.close(fd)
    source.rename(target)


class _Draft:
    """A script under way."""

    def __init__(self) -> None:
        self.lines = [b"ssv kbytes_written 0"]
        self.attributes: list[bytes] = []
        #: Absolute path of the first name of a node with several.
        self._first: dict[int, bytes] = {}

    def add_children(self, directory: Node, path: bytes) -> None:
        """Make everything below a directory, which is the current one."""
        for key in sorted(directory.children):
            node, name, full = directory.children[key].node, _quoted(b"./" + key), path + b"/" + key
            known = self._first.get(id(node))
            if known is not None:
                # debugfs enlarges no directory for a link. It does for a symbolic link, whose place is free then.
                self.lines += [b"symlink %b x" % name, b"rm %b" % name, b"link %b %b" % (_quoted(known), name)]
                continue
            if node.links > 1 and node.kind is not NodeKind.DIRECTORY:
                self._first[id(node)] = full
            self._add(node, name, full)
            self.add_attributes(node, name)

    def _add(self, node: Node, name: bytes, full: bytes) -> None:
        match node.kind:
            case NodeKind.DIRECTORY:
                self.lines += [b"cd %b" % name] if full == _LOST_AND_FOUND else [b"mkdir %b" % name, b"cd %b" % name]
                self.add_children(node, full)
                self.lines.append(b"cd ..")
            case NodeKind.SYMLINK:
                self.lines.append(b"symlink %b %b" % (name, _quoted(node.target)))
            case NodeKind.FIFO:
                # Alone among the commands it takes a bare name, in the current directory.
                self.lines.append(b"mknod %b p" % _quoted(full.rpartition(b"/")[2]))
            case NodeKind.FILE:
                self.lines.append(b"write %b/%d %b" % (CONTENT.encode(), node.content, name))

    def add_attributes(self, node: Node, quoted: bytes) -> None:
        """Give a file what is its own."""
        fields = [
            (b"mode", b"0%o" % (node.kind.value | node.mode)),
            (b"uid", b"%d" % node.uid),
            (b"gid", b"%d" % node.gid),
            (b"mtime", b"@%d" % min(node.mtime, _MAX_TIME)),
            *((field, b"@%d" % EPOCH_S) for field in (b"ctime", b"atime", b"crtime")),
        ]
        if node.links > 1 and node.kind is not NodeKind.DIRECTORY:
            fields.append((b"links_count", b"%d" % node.links))
        self.lines += [b"sif %b %b %b" % (quoted, field, value) for field, value in fields]
        for key in sorted(node.xattrs):
            value = f"{CONTENT}/x{len(self.attributes)}".encode()
            self.attributes.append(node.xattrs[key])
            self.lines.append(b"ea_set -f %b %b %b" % (value, quoted, _quoted(key)))


def _quoted(text: bytes) -> bytes:
    """One word for debugfs: in double quotes, of which those inside are doubled; nothing else is special."""
    return b'"' + text.replace(b'"', b'""') + b'"'
