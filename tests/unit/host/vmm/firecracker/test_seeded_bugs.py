"""The fake is worth its name: it objects to a driver with a bug, by each of these bugs alone.

`use` does with a machine what a daemon does. The driver as it is passes; each bug is put into it and must be seen, by
the words in which the fake, or what it keeps from happening, complains.
"""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from fusevm.host.agent import ask_shutdown
from fusevm.host.vmm.firecracker import calls, client, driver, records, sockets, staging
from fusevm.host.vmm.firecracker import vmm as vmms
from fusevm.host.vmm.firecracker.calls import Call
from fusevm.host.vmm.firecracker.client import Fault
from fusevm.host.vmm.firecracker.jail import Inside
from fusevm.model.errors import BootFailed
from fusevm.testing.fake_firecracker.server import MAX_CONNECTIONS

#: Generous where it is about success; where a bug makes silence, that is what is waited for.
LIMIT_S = 60
SILENCE_S = 2
pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
change = msgspec.structs.replace


async def use(bench, limit_s: float = LIMIT_S) -> None:
    """A machine's whole life: start, words with its agent, a pause, a second daemon, an end, and a second start."""
    plan = await bench.plan()
    vmm = await bench.boot(plan)
    async with asyncio.timeout(limit_s):
        assert await bench.ask_nonce(vmm) == plan.machine_id
        named = await vmm.api.metadata()
        assert named == {"latest": {"meta-data": {"instance-id": plan.machine_id}}}, f"metadata are {named}"
        await vmm.pause()
        await vmm.resume()
        assert await bench.ask_nonce(vmm) == plan.machine_id
        await vmm.close()
        adopted = await bench.adopt(plan, vmm.process)
        assert await bench.ask_nonce(adopted) == plan.machine_id
        await ask_shutdown(adopted)
        assert await adopted.wait_exit() == "the guest shut down"
        again = await bench.boot(plan)
        assert await bench.ask_nonce(again) == plan.machine_id
        await again.kill()


def change_calls(monkeypatch, edit) -> None:
    """Let a driver say what `edit` makes of its calls."""
    plan_boot = calls.plan_boot
    monkeypatch.setattr(driver, "plan_boot", lambda plan, inside: edit(plan_boot(plan, inside)))


def change_body(monkeypatch, path: str, edit) -> None:
    """Let a driver send what `edit` makes of one body."""
    change_calls(
        monkeypatch,
        lambda planned: [call._replace(body=edit(call.body)) if call.path == path else call for call in planned],
    )


def move(planned: list[Call], path: str, to: int) -> list[Call]:
    moved = next(call for call in planned if call.path == path)
    rest = [call for call in planned if call is not moved]
    return [*rest[:to], moved, *rest[to:]] if to >= 0 else [*rest, moved]


# -- the bugs ----------------------------------------------------------------------------------------------------------


def start_before_the_disks(monkeypatch) -> None:
    change_calls(monkeypatch, lambda planned: move(planned, "/actions", 5))


def serial_after_the_start(monkeypatch) -> None:
    change_calls(monkeypatch, lambda planned: move(planned, "/serial", -1))


def log_configured_twice(monkeypatch) -> None:
    change_calls(monkeypatch, lambda planned: [planned[0], *planned])


def metadata_service_without_its_interface(monkeypatch) -> None:
    service = Call("PUT", "/mmds/config", records.MmdsConfig(network_interfaces=("net0",), version="V2"))
    change_calls(monkeypatch, lambda planned: [*planned[:-1], service, planned[-1]])


def no_vsock(monkeypatch) -> None:
    change_calls(monkeypatch, lambda planned: [call for call in planned if call.path != "/vsock"])


def an_unknown_field(monkeypatch) -> None:
    class Balloon(records.Balloon, frozen=True, kw_only=True):
        deflate_on_out_of_memory: bool = False

    body = Balloon(amount_mib=0, deflate_on_oom=True, deflate_on_out_of_memory=True)
    change_body(monkeypatch, "/balloon", lambda _body: body)


def a_missing_field(monkeypatch) -> None:
    class Drive(records.Drive, frozen=True, kw_only=True):
        is_root_device: bool = False  # its default is not sent

    body = Drive(drive_id="overlay", path_on_host="/overlay")
    change_body(monkeypatch, "/drives/overlay", lambda _body: body)


def another_drive_id_than_the_paths(monkeypatch) -> None:
    change_body(monkeypatch, "/drives/overlay", lambda body: change(body, drive_id="disk"))


def a_drive_id_that_no_path_can_name(monkeypatch) -> None:
    def edit(planned: list[Call]) -> list[Call]:
        body = records.Drive(drive_id="over-lay", path_on_host="/overlay", is_root_device=False)
        return [Call("PUT", "/drives/over-lay", body) if "drives" in call.path else call for call in planned]

    change_calls(monkeypatch, edit)


def two_root_devices(monkeypatch) -> None:
    drives = [records.Drive(drive_id=name, path_on_host="/overlay", is_root_device=True) for name in ("a", "b")]
    change_calls(monkeypatch, lambda planned: [*(Call("PUT", f"/drives/{d.drive_id}", d) for d in drives), *planned])


def a_path_of_the_host(monkeypatch) -> None:
    change_body(monkeypatch, "/boot-source", lambda body: change(body, kernel_image_path="/var/cache/vmlinux"))


def the_hosts_own_context_id(monkeypatch) -> None:
    change_body(monkeypatch, "/vsock", lambda body: change(body, guest_cid=2))


def a_command_line_that_is_too_long(monkeypatch) -> None:
    change_body(monkeypatch, "/boot-source", lambda body: change(body, boot_args=body.boot_args + " x" * 2048))


def no_metadata_option(monkeypatch) -> None:
    render = driver.render_jailer
    monkeypatch.setattr(driver, "render_jailer", lambda *words: render(*words)[:-2])


def pause_by_the_api(monkeypatch) -> None:
    class VmState(msgspec.Struct):
        state: str

    async def pause(self: vmms.FirecrackerVmm) -> None:
        await self.api.send(Call("PATCH", "/vm", VmState("Paused")))

    async def resume(self: vmms.FirecrackerVmm) -> None:
        await self.api.send(Call("PATCH", "/vm", VmState("Resumed")))

    monkeypatch.setattr(vmms.FirecrackerVmm, "pause", pause)
    monkeypatch.setattr(vmms.FirecrackerVmm, "resume", resume)


def handshake_in_two_writes(monkeypatch) -> None:
    async def connect_guest(path: Path, uid: int | None, port: int) -> sockets.GuestConnection:
        stream = await sockets.connect_inside(path, uid)
        try:
            await stream.write(b"CONNECT ")
            await asyncio.sleep(0.05)
            await stream.write(b"%d\n" % port)
            sockets._check_answer(await sockets._read_line(stream))
        except BaseException:
            await stream.close()
            raise
        return stream

    monkeypatch.setattr(vmms, "connect_guest", connect_guest)


def a_connection_for_each_call(monkeypatch) -> list:
    kept = []
    ready = client.ApiClient._ready

    async def _ready(self: client.ApiClient):
        self._connection = None
        kept.append(await ready(self))
        return kept[-1]

    monkeypatch.setattr(client.ApiClient, "_ready", _ready)
    return kept


def a_body_with_a_question(monkeypatch) -> None:
    async def metadata(self: client.ApiClient) -> object:
        return msgspec.json.decode(await self.send(Call("GET", "/mmds", records.Metrics(metrics_path="x"))))

    monkeypatch.setattr(client.ApiClient, "metadata", metadata)


def what_the_machines_user_cannot_open(monkeypatch) -> None:
    monkeypatch.setattr(staging, "_give", lambda path, uid, gid: None)


def a_jail_that_is_used_again(monkeypatch) -> None:
    def stage(plan, jail, inside: Inside) -> None:
        if not jail.root.exists():
            kept(plan, jail, inside)

    kept = staging.stage
    monkeypatch.setattr(staging, "stage", stage)
    monkeypatch.setattr(staging, "remove", lambda base: None)


#: What is refused, and in which words.
REFUSED = {
    start_before_the_disks: "PUT /drives/.*not supported after starting",
    serial_after_the_start: "PUT /serial.*not supported after starting",
    log_configured_twice: "already initialized",
    metadata_service_without_its_interface: "network interface IDs",
    an_unknown_field: "unknown field `deflate_on_out_of_memory`",
    a_missing_field: "missing field `is_root_device`",
    another_drive_id_than_the_paths: "does not match the id from the body",
    a_drive_id_that_no_path_can_name: "Invalid char",
    two_root_devices: "A root block device already exists",
    a_path_of_the_host: "No such file or directory: '/var/cache/vmlinux'",
    the_hosts_own_context_id: "CID is reserved",
    a_command_line_that_is_too_long: "command line is too long",
    no_metadata_option: "metadata are {}",
    a_connection_for_each_call: "did not start",
    a_body_with_a_question: "GET request cannot have a body",
    what_the_machines_user_cannot_open: "another user's named pipe",
    a_jail_that_is_used_again: "Jailer error",
}


#: What the guest cannot be reached by.
SILENCED = [no_vsock, pause_by_the_api, handshake_in_two_writes]


async def test_the_driver_as_it_is_passes(bench):
    await use(bench)


@pytest.mark.parametrize("bug", REFUSED, ids=lambda bug: bug.__name__)
async def test_a_bug_is_refused(bench, monkeypatch, bug):
    with monkeypatch.context() as seeded:
        kept = bug(seeded)
        with pytest.raises((BootFailed, Fault, AssertionError), match=REFUSED[bug]):
            await use(bench)
    bench.sweep()
    for connection in kept or ():
        await connection.close()


@pytest.mark.parametrize("bug", SILENCED, ids=lambda bug: bug.__name__)
async def test_a_bug_is_met_with_silence(bench, monkeypatch, bug):
    with monkeypatch.context() as seeded:
        bug(seeded)
        with pytest.raises(TimeoutError):
            await use(bench, SILENCE_S)


def test_each_boot_needs_more_calls_than_there_may_be_connections(whole_plan):
    """Else one connection for each call would not be seen."""
    assert len(calls.plan_boot(whole_plan, Inside())) > MAX_CONNECTIONS
