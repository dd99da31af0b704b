"""Images from a real registry on loopback."""

import asyncio
import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusevm.host.images.collect import Collector, Watermarks
from fusevm.host.images.progress import ProgressEvent
from fusevm.host.images.pull import Limits, pull_image
from fusevm.host.images.registry import Access
from fusevm.host.images.store import ImageStore, Origin
from fusevm.host.run import run
from fusevm.model.errors import (
    DigestMismatch,
    FetchFailed,
    ImageInUse,
    ImageNotFound,
    ImageRefused,
    ImageTooLarge,
    ImageUnknown,
)
from image_factory import INDEX, MANIFEST, ImageFiles, describe, entry, hard_link, make_tar
from oci_registry import MISSING, Registry, registry

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Registry]:
    with registry(tmp_path / "hub") as running:
        yield running


def tool(*, architecture: str = "amd64", body: bytes = b"#!/bin/sh\n") -> ImageFiles:
    """A small image of two layers."""
    lower = make_tar(entry("bin/tool", body, mode=0o755), entry("etc/old", b"old"))
    upper = make_tar(entry("etc/.wh.old"), entry("etc/new", b"new"))
    return ImageFiles(
        lower, upper, architecture=architecture, Entrypoint=["/bin/tool"], Cmd=["serve"], Env=["PORT=80"], User="7:8"
    )


async def test_an_image_is_pulled_by_tag_and_by_digest(tmp_path: Path, hub: Registry):
    digest = hub.push(tool().write_layout(tmp_path / "layout"), "team/tool:1.2")
    store = ImageStore(tmp_path / "data")
    told: list[ProgressEvent] = []
    image = await pull_image(store, f"{hub.address}/team/tool:1.2", progress=told.append)
    assert image.names == (f"{hub.address}/team/tool:1.2",)
    assert (image.record.origin, image.record.manifest_digest) == (Origin.PULLED, digest)
    assert (image.config.entrypoint, image.config.cmd) == (("/bin/tool",), ("serve",))
    assert (image.config.env, image.config.user) == ({"PORT": "80"}, "7:8")
    etc = (await run(["debugfs", "-R", "ls -p /etc", image.rootfs], timeout_s=60)).text
    assert "/new/" in etc
    assert "/old/" not in etc
    assert any(event.done_bytes for event in told)
    assert told[-1].step == "Image ready"
    # By digest, under a name: it is here already, so nothing is fetched.
    told.clear()
    again = await pull_image(store, f"{hub.address}/team/tool@{digest}", name="tool", progress=told.append)
    assert again.digest == image.digest
    assert again.names == (f"{hub.address}/team/tool:1.2", "tool")
    assert told[-1].detail.endswith("is here already")
    assert sorted(path.name for path in store.root.glob(".build-*")) == []


async def test_a_damaged_copy_is_replaced_when_forced(tmp_path: Path, hub: Registry):
    hub.push(tool().write_layout(tmp_path / "layout"), "tool:1")
    store, reference = ImageStore(tmp_path / "data"), f"{hub.address}/tool:1"
    image = await pull_image(store, reference)
    good = image.rootfs.read_bytes()
    image.rootfs.chmod(0o600)
    image.rootfs.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert [one.image for one in await store.find_damage()] == [reference]
    again = await pull_image(store, reference, force=True)
    assert again.digest == image.digest
    assert again.rootfs.read_bytes() == good
    assert await store.find_damage() == []


async def test_a_tag_that_has_moved_is_followed(tmp_path: Path, hub: Registry):
    store = ImageStore(tmp_path / "data")
    reference = f"{hub.address}/tool"
    hub.push(tool().write_layout(tmp_path / "a"), "tool:latest")
    first = await pull_image(store, reference)
    assert first.names == (reference, f"{reference}:latest")
    hub.push(tool(body=b"other").write_layout(tmp_path / "b"), "tool:latest")
    second = await pull_image(store, reference)
    assert second.digest != first.digest
    assert (await store.resolve(reference)).digest == second.digest
    # The older one has no name left: the broom takes it when it has lain for a while, unless something uses it.
    used: dict[str, list[str]] = {first.digest: ["machine m-1"]}

    async def users() -> dict[str, list[str]]:
        return used

    clock = [0.0]
    collector = Collector(store, users, Watermarks(high=90, low=80), now_s=lambda: clock[0])
    clock[0] = (first.directory / "image.json").stat().st_mtime + 3600
    assert await collector.collect(is_all=False) == []
    with pytest.raises(ImageInUse, match="m-1"):
        await collector.remove(first.digest)
    used.clear()
    assert [one.digest for one in await collector.collect(is_all=False)] == [first.digest]
    assert (await store.resolve(reference)).digest == second.digest
    # A name goes by itself as long as there is another.
    assert (await collector.remove(reference)).bytes == 0
    assert (await collector.remove(f"{reference}:latest")).digest == second.digest
    with pytest.raises(ImageNotFound):
        await store.resolve(second.digest)


async def test_of_an_index_this_hosts_manifest_is_taken(tmp_path: Path, hub: Registry):
    store = ImageStore(tmp_path / "data")
    described = []
    for architecture in ("s390x", "amd64"):
        files = tool(architecture=architecture)
        hub.push(files.write_layout(tmp_path / architecture), f"multi:{architecture}")
        raw = json.dumps(files.manifest).encode()
        described.append({**describe(raw, MANIFEST), "platform": {"architecture": architecture, "os": "linux"}})
    attestation = {**described[0], "platform": {"architecture": "unknown", "os": "unknown"}}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*described, attestation]}
    hub.put("multi/manifests/all", json.dumps(index).encode(), INDEX)
    image = await pull_image(store, f"{hub.address}/multi:all")
    assert image.record.manifest_digest == described[1]["digest"]
    hub.put("multi/manifests/other", json.dumps({**index, "manifests": described[:1]}).encode(), INDEX)
    with pytest.raises(ImageUnknown, match="linux/s390x"):
        await pull_image(store, f"{hub.address}/multi:other")


async def test_what_the_registry_does_not_have_is_said(tmp_path: Path, hub: Registry):
    store = ImageStore(tmp_path / "data")
    hub.push(tool().write_layout(tmp_path / "layout"), "tool:1")
    for name in ("nothing", "tool:2", f"tool@sha256:{'0' * 64}"):
        with pytest.raises(ImageUnknown, match=name):
            await pull_image(store, f"{hub.address}/{name}")
    with pytest.raises(FetchFailed, match="refused"):
        await pull_image(store, "127.0.0.1:1/tool")
    assert await store.load_all() == []
    assert list(store.root.glob(".build-*")) == []


async def test_a_blob_that_was_changed_is_noticed(tmp_path: Path, hub: Registry):
    files = tool()
    hub.push(files.write_layout(tmp_path / "layout"), "tool:1")
    for part in (files.manifest["layers"][1], files.manifest["config"]):
        hub.damage(part["digest"])
        with pytest.raises((ImageRefused, DigestMismatch, FetchFailed)):
            await pull_image(ImageStore(tmp_path / "data"), f"{hub.address}/tool:1")
        hub.damage(part["digest"])  # and back
    assert await ImageStore(tmp_path / "data").load_all() == []
    assert await pull_image(ImageStore(tmp_path / "data"), f"{hub.address}/tool:1")


async def test_hostile_images_are_refused_from_a_registry_too(tmp_path: Path, hub: Registry):
    store = ImageStore(tmp_path / "data")
    hub.push(ImageFiles(make_tar(hard_link("x", "../../etc/shadow"))).write_layout(tmp_path / "l"), "evil:1")
    with pytest.raises(ImageRefused, match="leads out"):
        await pull_image(store, f"{hub.address}/evil:1")
    big = ImageFiles(make_tar(entry("x", os.urandom(3 << 20))))
    hub.push(big.write_layout(tmp_path / "big"), "big:1")
    # By what the manifest says, before anything is fetched.
    with pytest.raises(ImageTooLarge, match="bytes, of"):
        await pull_image(store, f"{hub.address}/big:1", limits=Limits(max_bytes=1 << 20))
    # A manifest of something that is no image of files.
    manifest = tool().manifest
    manifest["layers"][0]["mediaType"] = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
    for layer in (*tool().layers, tool().config_bytes):
        hub.upload("chart", layer)
    hub.put("chart/manifests/1", json.dumps(manifest).encode(), MANIFEST)
    with pytest.raises(ImageRefused, match="no layer of files"):
        await pull_image(store, f"{hub.address}/chart:1")
    assert await store.load_all() == []
    assert list(store.root.glob(".build-*")) == []


async def test_many_pulls_of_one_reference_fetch_it_once(tmp_path: Path, hub: Registry):
    hub.push(tool().write_layout(tmp_path / "layout"), "tool:1")
    store = ImageStore(tmp_path / "data")
    told: list[ProgressEvent] = []
    found = await asyncio.gather(*(pull_image(store, f"{hub.address}/tool:1", progress=told.append) for _ in range(3)))
    assert len({image.digest for image in found}) == 1
    assert sum(event.detail.endswith("is here already") for event in told) == 2


async def test_credentials_open_a_private_registry(tmp_path: Path):
    passwords = tmp_path / "htpasswd"
    # bcrypt of `secret`, as htpasswd(1) writes it.
    passwords.write_text("user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n")
    layout = tool().write_layout(tmp_path / "layout")
    login = base64.b64encode(b"user:secret").decode()
    with registry(tmp_path / "private", auth=f"auth: {{htpasswd: {{realm: test, path: {passwords}}}}}") as hub:
        auth = json.dumps({"auths": {hub.address: {"auth": login}}}).encode()
        (tmp_path / "auth.json").write_bytes(auth)
        words = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        words += [f"--dest-authfile={tmp_path / 'auth.json'}", f"oci:{layout}:latest", f"docker://{hub.address}/tool:1"]
        await run(words, timeout_s=120)
        store = ImageStore(tmp_path / "data")
        with pytest.raises(ImageUnknown, match="authfile"):
            await pull_image(store, f"{hub.address}/tool:1")
        image = await pull_image(store, f"{hub.address}/tool:1", access=Access(credentials=auth))
        assert image.config.cmd == ("serve",)
    assert b"secret" not in b"".join(path.read_bytes() for path in store.root.rglob("*.json"))
