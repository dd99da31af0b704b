"""Filling and removing a jail: what the machine reads and writes is linked into it, nothing is copied.

Links share the file: what is shared (kernel, initramfs, image) is never given to the machine's user, only readable.
"""

import os
from pathlib import Path
from typing import Final

import msgspec

from fusevm.host.removal import remove_tree
from fusevm.host.vmm.driver import BootPlan
from fusevm.host.vmm.firecracker.jail import Inside, Jail
from fusevm.model.errors import BadSetting

#: The owner and nobody else.
_PRIVATE: Final = 0o700


def stage(plan: BootPlan, jail: Jail, inside: Inside) -> None:
    """Make the jail's root with all its files, in place of one that an earlier process has left. Raises BadSetting."""
    remove(jail.base)
    check_file_system(jail.base.parent)
    uid, gid = plan.confinement.uid, plan.confinement.gid
    jail.root.mkdir(parents=True, mode=0o755)
    run = jail.outside(inside.api).parent
    run.mkdir(mode=_PRIVATE)
    for source, path in linked_files(plan, inside).items():
        _link(source, jail.outside(path))
    jail.outside(inside.metadata).write_bytes(render_metadata(plan))
    jail.outside(inside.metadata).chmod(0o444)
    for path in (inside.log, inside.metrics, inside.console):
        os.mkfifo(jail.outside(path), 0o600)
        _give(jail.outside(path), uid, gid)
    _give(run, uid, gid)


def check_file_system(folder: Path) -> None:
    """Raise BadSetting where no device can be opened, or no program run: a jail has /dev/kvm and Firecracker itself."""
    flags = os.statvfs(folder).f_flag
    for flag, option in ((os.ST_NODEV, "nodev"), (os.ST_NOEXEC, "noexec")):
        if flags & flag:
            remedy = "mount it without, or choose another data root, or run machines with `--driver qemu`"
            raise BadSetting(setting="data_root", problem=f"{folder} is mounted with `{option}`; {remedy}")


def render_metadata(plan: BootPlan) -> bytes:
    """What the guest may read from the metadata service: its name, nothing secret. Pure."""
    return msgspec.json.encode({"latest": {"meta-data": {"instance-id": plan.machine_id}}})


def linked_files(plan: BootPlan, inside: Inside) -> dict[Path, str]:
    """Files of a plan, and where they are in the jail. Pure."""
    files = {plan.kernel: inside.kernel, plan.initramfs: inside.initramfs}
    if plan.image is not None:
        files[plan.image] = inside.image
    if plan.overlay is not None:
        files[plan.overlay] = inside.overlay
    return files


def remove(base: Path) -> None:
    """Remove a machine's jail; its process has ended. Idempotent; follows no links."""
    remove_tree(base)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        remedy = "keep images, kernels and machines on one file system"
        problem = f"{source} cannot be linked into the machine's jail ({error.strerror}); {remedy}"
        raise BadSetting(setting="data_root", problem=problem) from error


def _give(path: Path, uid: int | None, gid: int | None) -> None:
    if uid is not None and gid is not None:
        os.chown(path, uid, gid, follow_symlinks=False)
