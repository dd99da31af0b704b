"""Ids and names that mean to be paths: every route refuses them before anything is touched."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.listeners import bind_unix, serving
from fusevm.host.removal import remove_tree
from fusevm.testing.host_world import World, fence, order
from fusevm.wire.host_api import fence_headers
from fusevm.wire.host_routes import HOST_ROUTES
from fusevm.wire.http1 import Connection
from fusevm.wire.streams import open_unix

#: As they are sent: the server undoes percent signs.
NAMES = (
    "..",
    ".",
    "%2e%2e",
    "..%2f..%2fetc",
    "%2e%2e%2f%2e%2e%2fjournal.db",
    "m-1%2f..%2f..",
    "m-1%00",
    "m-1%0a",
    "%2fetc%2fpasswd",
    "-rf",
    "M-1",
    "m_1",
    "m%201",
    "m-1;reboot",
    "%ff%fe",
    "a" * 64,
    "a" * 4096,
    "$(reboot)",
    "*",
)
PATHS = [route for route in HOST_ROUTES if "{" in route.path and not route.is_websocket]


class Served:
    """A daemon behind a socket, and its world."""

    def __init__(self, world: World, socket: Path) -> None:
        self.world = world
        self.socket = socket

    async def call(self, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
        connection = Connection(await open_unix(str(self.socket)))
        try:
            response = await connection.request(method, target, headers=fence_headers(fence("u9")), body=body)
            return response.status, await response.read()
        finally:
            await connection.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    world = World(tmp_path)
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), fence("u1"))
        app = Boundary(make_router(daemon), daemon.metrics, secret=None)
        async with serving(bind_unix(tmp_path / "api.sock"), app):
            yield Served(world, tmp_path / "api.sock")
            daemon.events.close()


@pytest.mark.parametrize("route", PATHS, ids=[route.name for route in PATHS])
async def test_no_route_takes_a_name_that_is_no_name(served: Served, route):
    files = {path for path in served.world.root.rglob("*") if path.name != "journal.db-wal"}
    for name in NAMES:
        target = re.sub(r"\{[a-z_]+\}", lambda _part, name=name: name, route.path.replace("{path:path}", "health"))
        status, content = await served.call(route.method, target, b"{}" if route.method in ("POST", "PUT") else b"")
        # A name that is a path may lead to another route, or none; never to a success, never to a crash.
        assert status in (400, 404, 405, 501 if route.unimplemented else 400), (name, status, content)
    assert served.world.leftovers == ({"m-1"}, {"m-1"}, {"m-1"})
    assert {path for path in served.world.root.rglob("*") if path.name != "journal.db-wal"} == files


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "m-1/../..", "M", "a" * 64, "a\x00", "a\n", "-a", "ä"])
async def test_no_machine_is_made_under_such_a_name(served: Served, name: str):
    body = {"machine_id": name, "spec": {"image": "debian-12"}}
    status, content = await served.call("POST", "/machines", json.dumps(body).encode())
    assert (status, json.loads(content)["details"]["reason"]) == (400, "bad_field"), content
    assert served.world.leftovers == ({"m-1"}, {"m-1"}, {"m-1"})


@pytest.mark.parametrize(
    "hostname", ["a b", "a fuse.nonce=x", "../x", "a\n", "-a", "a..b", "ä", "a" * 64, "init=/bin/sh x"]
)
async def test_no_host_name_becomes_more_than_one_word_of_the_kernel(served: Served, hostname: str):
    body = {"machine_id": "m-2", "spec": {"image": "debian-12", "hostname": hostname}}
    status, content = await served.call("POST", "/machines", json.dumps(body).encode())
    assert (status, json.loads(content)["details"]["reason"]) == (400, "bad_field"), content


def test_removing_a_directory_follows_no_link(tmp_path: Path):
    outside, inside = tmp_path / "outside", tmp_path / "m-1"
    outside.mkdir()
    (outside / "precious").touch()
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    remove_tree(inside)
    assert (outside / "precious").exists()
    (tmp_path / "m-2").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        remove_tree(tmp_path / "m-2")
    assert (outside / "precious").exists()
