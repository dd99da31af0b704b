"""The door to nftables: whole transactions, refusals that can be tried in a shell, calls that are not overtaken."""

import asyncio
import contextlib
import os
import resource
from pathlib import Path

import pytest
from namespaces import private_network
from network_lab import sh

from fusevm.host.net import transaction
from fusevm.host.net.nft import Table
from fusevm.host.net.transaction import apply_transaction, list_rules, list_ruleset, list_table
from fusevm.model.errors import CommandFailed, ToolMissing

TABLE = Table("inet", "fuse_try")
MAKE = [*TABLE.replace(), TABLE.set("seen", "ipv4_addr", counts=True), TABLE.chain("some")]


@private_network
async def test_a_refused_transaction_changes_nothing_and_says_why():
    with pytest.raises(CommandFailed) as caught:
        await apply_transaction([*MAKE, TABLE.delete_chain("missing")])
    assert caught.value.command == "nft -j -f -"
    assert "No such file or directory" in caught.value.stderr
    assert sh("nft list ruleset") == ""


@private_network
async def test_what_is_listed_is_what_was_applied():
    await apply_transaction([*MAKE, *TABLE.add_elements("seen", ["192.0.2.1"])])
    assert b"192.0.2.1" in await list_table("fuse_try")
    rules = await list_rules("fuse_try")
    assert b"chain some" in rules
    assert b"192.0.2.1" not in rules
    ruleset = await list_ruleset()
    assert b"fuse_try" in ruleset
    assert b"192.0.2.1" not in ruleset
    assert (await list_table("missing"), await list_rules("missing")) == (b"", b"")


@private_network
async def test_a_cancelled_call_is_not_overtaken_by_the_next():
    await apply_transaction(MAKE)
    first = asyncio.create_task(apply_transaction(TABLE.add_elements("seen", ["192.0.2.1"])))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await apply_transaction(TABLE.delete_elements("seen", ["192.0.2.1"]))  # it would be refused before the first


@private_network
async def test_a_namespace_has_rules_of_its_own():
    sh("ip netns add fuse-try")
    try:
        await apply_transaction(MAKE, namespace_path="/run/netns/fuse-try")
        assert "fuse_try" in sh("ip netns exec fuse-try nft list ruleset")
        assert sh("nft list ruleset") == ""
    finally:
        sh("ip netns del fuse-try")


@private_network
async def test_calls_leave_no_descriptor_behind():
    await apply_transaction(MAKE)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        await list_table("fuse_try")
        with pytest.raises(CommandFailed):
            await apply_transaction([TABLE.delete_chain("missing")])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_a_host_without_the_library_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(transaction, "_LIBRARY", "libnftables.so.missing")
    transaction._load.cache_clear()
    with pytest.raises(ToolMissing, match="apt-get install nftables"):
        await list_table("fuse_try")


@private_network
async def test_a_daemon_without_a_free_descriptor_lives_on():
    """The library would end the process."""
    held = [os.open("/dev/null", os.O_RDONLY)]
    await apply_transaction(MAKE)  # whatever it keeps is there now
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        last = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):
            await list_table("fuse_try")
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert b"fuse_try" in await list_table("fuse_try")
