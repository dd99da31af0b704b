"""The daemon's image routes: a fake driver, real images, a real registry."""

import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fusevm.host.api import make_router
from fusevm.host.boundary import Boundary
from fusevm.host.listeners import bind_unix, serving
from fusevm.model.errors import BadField, BadReference, ImageInUse, ImageNotFound, ImageUnknown
from fusevm.testing.host_world import SPEC, World, fence, until
from fusevm.wire.errors import parse_error
from fusevm.wire.host_api import CollectedImage, CollectedImages, ImageList, PullLine, fence_headers
from fusevm.wire.http1 import Connection
from fusevm.wire.streams import open_unix
from image_factory import ImageFiles, entry, make_tar
from oci_registry import MISSING, registry

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


class Api:
    """A client of a daemon that serves."""

    def __init__(self, world: World, path: Path) -> None:
        self.world = world
        self._path = path

    async def ask(self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes:
        """The body of a success; errors are raised as what they are."""
        connection = Connection(await open_unix(str(self._path)))
        try:
            data = json.dumps(body).encode() if body is not None else None
            response = await connection.request(method, target, headers=headers or {}, body=data)
            content = await response.read()
        finally:
            await connection.close()
        if response.status >= 400:
            raise parse_error(response.status, content)
        return content

    async def images(self) -> ImageList:
        return msgspec.json.decode(await self.ask("GET", "/images"), type=ImageList)

    async def pull(self, reference: str, **more: Any) -> list[PullLine]:
        content = await self.ask("POST", "/images/pull", {"reference": reference, **more})
        return [msgspec.json.decode(line, type=PullLine) for line in content.splitlines()]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    world = World(tmp_path / "world")
    async with serve(world, tmp_path / "api.sock") as api:
        yield api


@asynccontextmanager
async def serve(world: World, path: Path) -> AsyncIterator[Api]:
    async with world.daemon() as daemon:
        with contextlib.closing(bind_unix(path)) as listener:
            async with serving(listener, Boundary(make_router(daemon), daemon.metrics, secret=None)):
                yield Api(world, path)


async def test_an_image_is_pulled_listed_used_and_removed(tmp_path: Path, api: Api):
    files = ImageFiles(make_tar(entry("bin/tool", b"x")), Entrypoint=["/bin/tool"], Cmd=["go"], WorkingDir="/srv")
    with registry(tmp_path / "hub") as hub:
        digest = hub.push(files.write_layout(tmp_path / "layout"), "tool:1")
        *steps, last = await api.pull(f"{hub.address}/tool:1", name="tool")
        with pytest.raises(ImageUnknown):
            raise_failure(await api.pull(f"{hub.address}/other:1"))
    assert len({line.step for line in steps}) > 3
    assert last.image is not None
    image = (await api.images()).images[0]
    assert image == last.image
    assert (image.names, image.origin, image.manifest_digest) == (["tool"], "pulled", digest)
    assert (image.config.entrypoint, image.config.cmd, image.config.workdir) == (["/bin/tool"], ["go"], "/srv")
    facts = json.loads(await api.ask("GET", "/info"))
    assert facts["images"] == [image.digest, "tool"]

    # The fake driver takes every name for a digest.
    spec = {**msgspec.to_builtins(SPEC), "image": image.digest.removeprefix("sha256:")}
    await api.ask("POST", "/machines", {"machine_id": "m-1", "spec": spec}, fence_headers(fence("u1")))
    assert (await api.images()).images[0].users == ["machine m-1"]
    with pytest.raises(ImageInUse, match="machine m-1"):
        await api.ask("DELETE", "/images/tool")
    await api.ask("DELETE", "/machines/m-1", headers=fence_headers(fence("u1", action_seq=2)))
    removed = msgspec.json.decode(await api.ask("DELETE", "/images/tool"), type=CollectedImage)
    assert (removed.digest, removed.names) == (image.digest, ["tool"])
    assert removed.freed_bytes > 0
    with pytest.raises(ImageNotFound, match="pull"):
        await api.ask("DELETE", "/images/tool")
    assert (await api.images()).images == []


def raise_failure(lines: list[PullLine]) -> None:
    failure = lines[-1].failure
    assert failure is not None
    raise parse_error(500, msgspec.json.encode(failure))


async def test_a_pull_that_cannot_work_is_refused_at_once(api: Api):
    with pytest.raises(BadReference):
        await api.ask("POST", "/images/pull", {"reference": "../etc/passwd"})
    with pytest.raises(BadField, match="base64"):
        raise_failure(await api.pull("127.0.0.1:1/x", credentials_b64="%"))


async def test_the_broom_leaves_what_is_young(tmp_path: Path, api: Api):
    with registry(tmp_path / "hub") as hub:
        hub.push(ImageFiles(make_tar(entry("x", b"x"))).write_layout(tmp_path / "layout"), "team/tool:1")
        await api.pull(f"{hub.address}/team/tool:1")
    answer = msgspec.json.decode(await api.ask("POST", "/images/collect", {"all": True}), type=CollectedImages)
    assert answer.removed == []
    name = (await api.images()).images[0].names[0]
    await api.ask("DELETE", f"/images/{name}?force=true")
    assert (await api.images()).images == []


async def test_a_caller_that_goes_away_ends_its_pull(tmp_path: Path, api: Api):
    """A pull is its caller's: nothing of it is left when the connection is."""
    with registry(tmp_path / "hub") as hub:
        hub.push(ImageFiles(make_tar(entry("x", bytes(100 << 20)))).write_layout(tmp_path / "layout"), "big:1")
        connection = Connection(await open_unix(str(tmp_path / "api.sock")))
        body = json.dumps({"reference": f"{hub.address}/big:1"}).encode()
        response = await connection.request("POST", "/images/pull", body=body)
        async for chunk in response.chunks():
            if b"Unpacking" in chunk:
                break
        await connection.close()
        images = api.world.root / "data" / "images"
        await until(lambda: not list(images.glob(".build-*")))
    assert (await api.images()).images == []
