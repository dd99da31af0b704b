"""The cpio writer: a golden archive, and what a reader finds in it."""

import stat

import pytest

from fusevm.host.images.cpio import Entry, character_device, file, folder, write_archive
from fusevm.host.images.initramfs import render_initramfs

GOLDEN = (
    # ino      mode    uid     gid     nlink   mtime   filesize maj    min     rmaj    rmin    namesize check
    b"070701" b"00000001" b"000041ED" b"00000000" b"00000000" b"00000002" b"00000000" b"00000000"
    b"00000000" b"00000000" b"00000000" b"00000000" b"00000004" b"00000000" b"dev\0\0\0"
    b"070701" b"00000002" b"00002180" b"00000000" b"00000000" b"00000001" b"00000000" b"00000000"
    b"00000000" b"00000000" b"00000005" b"00000001" b"0000000C" b"00000000" b"dev/console\0\0\0"
    b"070701" b"00000003" b"000081ED" b"00000000" b"00000000" b"00000001" b"00000000" b"00000005"
    b"00000000" b"00000000" b"00000000" b"00000000" b"00000005" b"00000000" b"init\0\0" b"hello\0\0\0"
    b"070701" b"00000000" b"00000000" b"00000000" b"00000000" b"00000001" b"00000000" b"00000000"
    b"00000000" b"00000000" b"00000000" b"00000000" b"0000000B" b"00000000" b"TRAILER!!!\0\0\0\0"
)  # fmt: skip


def read_archive(data: bytes) -> list[Entry]:
    """Parse a newc archive as the kernel does."""
    entries, at = [], 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        at = -(-(at + 110 + fields[11]) // 4) * 4
        if name == "TRAILER!!!":
            assert at == len(data)
            return entries
        entries.append(
            Entry(path=name, mode=fields[1], content=data[at : at + fields[6]], device=(fields[9], fields[10]))
        )
        at = -(-(at + fields[6]) // 4) * 4


def test_a_small_archive_is_byte_for_byte_as_written_down():
    entries = [file("init", b"hello", 0o755), character_device("dev/console", 5, 1), folder("dev")]
    assert write_archive(entries) == GOLDEN


def test_the_order_of_entries_given_does_not_matter():
    entries = [folder("a"), file("a/b", b"1"), file("a/c", b"22"), folder("d")]
    assert write_archive(entries) == write_archive(reversed(entries))


def test_folders_come_before_their_content():
    paths = [entry.path for entry in read_archive(write_archive([file("a/b/c", b""), folder("a/b"), folder("a")]))]
    assert paths == ["a", "a/b", "a/b/c"]


def test_a_path_given_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        write_archive([folder("a"), file("a", b"")])


def test_an_initramfs_holds_the_agent_as_init_and_the_modules_in_load_order():
    entries = {
        entry.path: entry for entry in read_archive(render_initramfs(b"AGENT", [("z.ko", b"zz"), ("a.ko", b"a")]))
    }
    assert entries["init"].content == b"AGENT"
    assert entries["init"].mode == stat.S_IFREG | 0o755
    assert entries["modules/order"].content == b"z.ko\na.ko\n"
    assert entries["modules/z.ko"].content == b"zz"
    assert entries["dev/console"].device == (5, 1)
    assert stat.S_ISDIR(entries["proc"].mode)
