"""The kernel store, fed with synthetic kernels, and the initramfs cache over it."""

import gzip
import importlib.util
from pathlib import Path

import pytest

from fusevm.host.images.initramfs import ensure_initramfs
from fusevm.host.images.kernel import KernelStore
from fusevm.model.errors import KernelCorrupt

_spec = importlib.util.spec_from_file_location("bzimages", Path(__file__).with_name("test_bzimage.py"))
bzimages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bzimages)


@pytest.fixture
def kernel_file(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimages.make_bzimage(gzip.compress(bzimages.make_elf())))
    return path


async def test_a_kernel_file_is_stored_by_digest(tmp_path, kernel_file):
    store = KernelStore(tmp_path)
    kernel = await store.ensure(kernel_file)
    assert kernel.directory == tmp_path / "kernels" / kernel.digest[:12]
    assert kernel.vmlinux.read_bytes() == bzimages.make_elf()
    assert kernel.record.version == "6.12.117+deb12-cloud-amd64"
    assert kernel.modules == ()
    assert (await store.resolve(kernel.digest)).digest == kernel.digest
    await store.verify(kernel)


async def test_the_same_kernel_as_elf_and_as_bzimage_is_one(tmp_path, kernel_file):
    store = KernelStore(tmp_path)
    elf = tmp_path / "vmlinux"
    elf.write_bytes(bzimages.make_elf())
    assert (await store.ensure(kernel_file)).digest == (await store.ensure(elf)).digest
    assert len(await store.load_all()) == 1


async def test_a_file_that_is_no_kernel_is_named_with_what_is_wrong(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(KernelCorrupt, match="neither an ELF file nor a bzImage") as caught:
        await KernelStore(tmp_path).ensure(path)
    assert caught.value.path == str(path)


async def test_a_missing_kernel_file_is_named(tmp_path):
    with pytest.raises(KernelCorrupt, match="No such file"):
        await KernelStore(tmp_path).ensure(tmp_path / "nothing")


async def test_damage_in_the_store_is_found_and_repaired_by_the_same_file(tmp_path, kernel_file):
    store = KernelStore(tmp_path)
    kernel = await store.ensure(kernel_file)
    kernel.vmlinux.chmod(0o644)
    kernel.vmlinux.write_bytes(kernel.vmlinux.read_bytes()[:-1])
    with pytest.raises(KernelCorrupt, match="bytes instead of") as caught:
        await store.resolve(kernel.digest)
    assert caught.value.path == str(kernel.vmlinux)
    await store.verify(await store.ensure(kernel_file))


async def test_an_initramfs_is_made_once_per_agent_and_kernel(tmp_path, kernel_file):
    kernel = await KernelStore(tmp_path).ensure(kernel_file)
    agent = tmp_path / "fused"
    agent.write_bytes(b"one")
    first = await ensure_initramfs(tmp_path, kernel, agent)
    before = first.stat().st_mtime_ns
    assert await ensure_initramfs(tmp_path, kernel, agent) == first
    assert first.stat().st_mtime_ns == before
    agent.write_bytes(b"two")
    assert await ensure_initramfs(tmp_path, kernel, agent) != first
