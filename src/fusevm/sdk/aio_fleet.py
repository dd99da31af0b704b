"""Hosts, snapshots and API keys, asynchronously: the twin of `sdk.fleet`."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Unpack

from fusevm.model.errors import NotFound
from fusevm.model.snapshot import SnapshotState
from fusevm.sdk import core
from fusevm.sdk.aio_channel import AsyncChannel
from fusevm.sdk.choices import looks, make_key
from fusevm.sdk.core import SnapshotFields, SnapshotFilter
from fusevm.sdk.fleet import raise_unless_whole
from fusevm.wire.rest import HostBody, HostPage
from fusevm.wire.rest_fleet import CapacityInput, RegisterHost, ResolvedLayer, SnapshotBody, SnapshotPage
from fusevm.wire.rest_keys import CreateKey, KeyBody, NewKey

_Keys = list[KeyBody]


class AsyncHosts:
    """`/v1/hosts`."""

    def __init__(self, channel: AsyncChannel) -> None:
        self._channel = channel

    async def register(
        self,
        host_id: str,
        url: str,
        *,
        token: str = "",
        region: str = "",
        labels: dict[str, str] | None = None,
        capacity: CapacityInput | None = None,
    ) -> HostBody:
        """Register a host daemon, or update a known one; `warnings` says what looks wrong.

        Without a token, the known one of the host stays. Capacity that is not given is as the host reports it.
        Raises HostUnreachable, HostRejected, HostMismatch, BadField.
        """
        wanted = RegisterHost(
            id=host_id, url=url, token=token or None, region=region or None, labels=labels, capacity=capacity
        )
        return await self._channel.get(core.register_host(wanted))

    async def list(self) -> AsyncIterator[HostBody]:
        """All hosts, page by page as they are taken."""
        cursor = ""
        while True:
            page = await self.page(limit=200, cursor=cursor)
            for host in page.hosts:
                yield host
            cursor = page.next_cursor
            if not cursor:
                return

    async def page(self, *, limit: int | None = None, cursor: str = "") -> HostPage:
        """One page; `next_cursor` leads to the next one."""
        return await self._channel.get(core.list_hosts(limit=limit, cursor=cursor))

    async def get(self, host_id: str) -> HostBody:
        """One host. Raises HostNotFound."""
        return await self._channel.get(core.get_host(host_id))

    async def cordon(self, host_id: str) -> None:
        """Place nothing new there. What runs there goes on."""
        await self._channel.call(core.cordon_host(host_id))

    async def uncordon(self, host_id: str) -> None:
        """Place there again; also ends a drain."""
        await self._channel.call(core.uncordon_host(host_id))

    async def drain(self, host_id: str) -> None:
        """Cordon, and drain every environment there; returns when that has begun."""
        await self._channel.call(core.drain_host(host_id))

    async def delete(self, host_id: str, *, force: bool = False) -> None:
        """Forget a host without environments; a lost or refusing one with them, by `force`. Raises HostInUse."""
        await self._channel.call(core.delete_host(host_id, force=force))


class AsyncSnapshots:
    """`/v1/snapshots`."""

    def __init__(self, channel: AsyncChannel) -> None:
        self._channel = channel

    async def create(self, env_id: str, *, deadline_s: float = 900.0, **fields: Unpack[SnapshotFields]) -> SnapshotBody:
        """Take a snapshot of a running environment and return it once it is ready.

        Raises SnapshotFailed, NotSupported where the host takes none, WrongState, ActionUnderWay, Timeout.
        """
        taken = await self._channel.get(core.create_snapshot(env_id, fields, key=make_key()))
        return await self._settled(taken, SnapshotState.CREATING, deadline_s)

    async def begin(self, env_id: str, **fields: Unpack[SnapshotFields]) -> SnapshotBody:
        """Ask for a snapshot and return at once, state `creating`."""
        return await self._channel.get(core.create_snapshot(env_id, fields, key=make_key(), wait=False))

    async def list(self, **wanted: Unpack[SnapshotFilter]) -> AsyncIterator[SnapshotBody]:
        """All snapshots that match, newest first, page by page as they are taken."""
        cursor = ""
        while True:
            page = await self.page(limit=200, cursor=cursor, **wanted)
            for snapshot in page.snapshots:
                yield snapshot
            cursor = page.next_cursor
            if not cursor:
                return

    async def page(
        self, *, limit: int | None = None, cursor: str = "", **wanted: Unpack[SnapshotFilter]
    ) -> SnapshotPage:
        """One page; `next_cursor` leads to the next one."""
        return await self._channel.get(core.list_snapshots(wanted, limit=limit, cursor=cursor))

    async def get(self, snapshot_id: str) -> SnapshotBody:
        """One snapshot. Raises SnapshotNotFound."""
        return await self._channel.get(core.get_snapshot(snapshot_id))

    async def resolve(self, layer_key: str, arch: str) -> ResolvedLayer:
        """The newest ready layer of a key; a miss is `found` false."""
        return await self._channel.get(core.resolve_snapshot(layer_key, arch))

    async def restore(self, snapshot_id: str, *, deadline_s: float = 900.0) -> None:
        """Put the running environment that it was taken of back to it; returns when the machine runs again."""
        if not await self._channel.get(core.restore_snapshot(snapshot_id, key=make_key())):
            await self._settled(await self.get(snapshot_id), SnapshotState.RESTORING, deadline_s)

    async def delete(self, snapshot_id: str, *, wait: bool = True, deadline_s: float = 300.0) -> None:
        """Delete it; returns when its bytes are freed, or with `wait=False` when that is certain to happen."""
        is_gone = await self._channel.call(core.delete_snapshot(snapshot_id))
        if is_gone is not False or not wait:
            return
        for pause in looks(f"deleting {snapshot_id}", deadline_s):
            try:
                await self.get(snapshot_id)
            except NotFound:
                return
            await asyncio.sleep(pause)

    async def _settled(self, snapshot: SnapshotBody, busy: SnapshotState, deadline_s: float) -> SnapshotBody:
        for pause in looks(f"snapshot {snapshot.id}", deadline_s):
            if snapshot.state != busy:
                break
            await asyncio.sleep(pause)
            snapshot = await self.get(snapshot.id)
        raise_unless_whole(snapshot)
        return snapshot


class AsyncApiKeys:
    """`/v1/api-keys`. Takes the master token, or a key with the right `admin`."""

    def __init__(self, channel: AsyncChannel) -> None:
        self._channel = channel

    async def create(
        self, label: str = "", *, tenant: str = "", scopes: Sequence[str] = (), expires_in_seconds: int = 0
    ) -> NewKey:
        """Make a key. Its text (`key`) is told only now. No scopes: the usual ones; 0 seconds: without end."""
        wanted = CreateKey(label=label, tenant=tenant, scopes=[*scopes], expires_in_seconds=expires_in_seconds)
        return await self._channel.get(core.create_key(wanted, key=make_key()))

    async def list(self) -> _Keys:
        """All keys, revoked and expired ones included, newest first."""
        return (await self._channel.get(core.list_keys())).api_keys

    async def revoke(self, key_id: str) -> None:
        """Refuse a key from its next request on. Raises KeyNotFound."""
        await self._channel.call(core.revoke_key(key_id))
