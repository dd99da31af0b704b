"""computer-host's machine API: bodies, words, defaults, answers (docs/machine-api.md)."""

import asyncio
import hashlib
import json
import shlex
import stat
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "host" / "images"))
import file_server
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from machine_client import KEY, MachineApi

from fusevm.host.admission import Size
from fusevm.host.contract.handlers import CONTRACT_HANDLERS
from fusevm.host.images.artifact import make_importer
from fusevm.host.images.store import Image, ImageRecord, ImageStore
from fusevm.host.run import run
from fusevm.model.errors import (
    BadField,
    HostFull,
    MachineExists,
    MachineNotFound,
    Unimplemented,
    WrongCluster,
    WrongState,
)
from fusevm.model.machine import Contract, Fence, Isolation, Login
from fusevm.testing.host_world import SPEC, World, fence, order, until
from fusevm.wire.contract_routes import CONTRACT_ROUTES
from fusevm.wire.host_api import MachineList, fence_headers

ARTIFACT = {"kernel_image_url": "https://h/vmlinux", "rootfs_url": "https://h/rootfs.ext4"}
#: computer-host.md 3.8, but for the webhook and the size.
BODY: dict[str, Any] = {
    "machine_id": "m-1",
    "artifact": ARTIFACT,
    "memory_mib": 2048,
    "storage_bytes": 10737418240,
    "guest_config": {"hostname": "box", "authorized_keys": [KEY]},
}
GIB = 1 << 30


class Importer:
    """Pretends to fetch."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    async def import_artifact(self, rootfs_url: str, *, sha256: str | None = None) -> Image:
        self.asked.append((rootfs_url, sha256))
        record = ImageRecord(digest="sha256:" + "ab" * 32, rootfs_sha256="ab" * 32, size_bytes=1, created_at_ms=1)
        return Image(record=record, names=(), directory=Path("/nowhere"))


@pytest.fixture
def importer(api: MachineApi) -> Importer:
    api.daemon.artifacts = importer = Importer()
    return importer


# -- create ------------------------------------------------------------------------------------------------------------


async def test_the_contracts_own_example_is_answered_in_its_words(api: MachineApi, importer: Importer):
    machine = (await api.call("POST", "/machines", BODY, 201))["machine"]
    assert machine["id"] == "m-1"
    assert machine["artifact"] == ARTIFACT
    assert machine["phase"] == "running"
    assert machine["system_volume_id"] == "m-1-system"
    assert machine["runtime_host"] == "10.0.0.2"
    assert machine["guest_ssh_host_public_key"].startswith("ssh-ed25519 AAAA")
    assert {"created_at", "started_at"} <= set(machine)
    assert [(port["name"], port["port"], port["protocol"]) for port in machine["ports"]] == [
        ("ssh", 2222, "tcp"),
        ("vnc", 6080, "tcp"),
        ("exec", 49983, "tcp"),
    ]
    assert importer.asked == [("https://h/rootfs.ext4", None)]
    record = api.daemon.machines.record("m-1")
    assert (record.spec.cpus, record.spec.memory_mib, record.spec.disk_bytes) == (2, 2048, 10 * GIB)
    assert record.image_digest == "sha256:" + "ab" * 32
    assert (record.fence.cluster, record.spec.hostname) == ("local", "box")
    assert (await api.call("GET", "/machines/m-1"))["machine"] == machine


async def test_the_contracts_defaults_hold_for_it_alone(api: MachineApi):
    await api.create(memory_mib=-1, storage_bytes=0)
    spec = api.daemon.machines.record("m-1").spec
    assert (spec.cpus, spec.memory_mib, spec.disk_bytes) == (2, 3072, 10 * GIB)
    own = {"machine_id": "m-2", "spec": {"image": "debian-12"}}
    await api.call("POST", "/machines", own, 201)
    spec = api.daemon.machines.record("m-2").spec
    assert (spec.cpus, spec.memory_mib, spec.disk_bytes) == (1, 512, 4 * GIB)


async def test_the_two_forms_are_told_apart(api: MachineApi, importer: Importer):
    error = await api.fails("POST", "/machines", {**BODY, "spec": {"image": "debian-12"}})
    assert (error.reason, "not by both" in error.message) == ("bad_field", True)
    headers = fence_headers(fence())
    assert isinstance(await api.fails("POST", "/machines", BODY, headers), BadField)
    assert (await api.fails("POST", "/machines", {"machine_id": "m-1"})).reason == "bad_json"
    assert isinstance(await api.fails("POST", "/machines", {**BODY, "image": "debian-12"}), BadField)
    assert not importer.asked
    assert api.world.leftovers == (set(), set(), set())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machine_id", ".."),
        ("machine_id", "a/b"),
        ("machine_id", ""),
        ("machine_id", "A"),
        ("artifact", {**ARTIFACT, "rootfs_url": "file:///etc/passwd"}),
        ("artifact", {**ARTIFACT, "rootfs_url": "http://"}),
        ("artifact", {**ARTIFACT, "kernel_image_url": "ftp://h/k"}),
        ("guest_config", {"hostname": "a b"}),
        ("guest_config", {"hostname": "x" * 64}),
        ("guest_config", {"hostname": "a/b"}),
        ("guest_config", {"authorized_keys": [""]}),
        ("guest_config", {"authorized_keys": ["nonsense"]}),
        ("guest_config", {"authorized_keys": ["ssh-ed25519 AAAA"]}),
        ("guest_config", {"authorized_keys": [KEY + '\ncommand="rm" ' + KEY]}),
        ("guest_config", {"trusted_user_ca_keys": ["ssh-rsa " + KEY.split()[1]]}),
        ("memory_mib", 1),
        ("storage_bytes", 1),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_happens(
    api: MachineApi, importer: Importer, field: str, value: Any
):
    error = await api.fails("POST", "/machines", {**BODY, field: value})
    assert (error.code, error.status) == ("invalid_argument", 400)
    assert not importer.asked
    assert api.world.leftovers == (set(), set(), set())
    assert not api.daemon.machines.records()


async def test_what_is_not_served_says_so_and_why(api: MachineApi, importer: Importer):
    hook = {"guest_config": {"login_webhook": {"url": "https://cp/login", "bearer_token": "t"}}}
    for more, feature in (({"user_volume_ids": ["v"]}, "user_volume_ids"), (hook, "login_webhook")):
        error = await api.fails("POST", "/machines", {**BODY, **more})
        assert isinstance(error, Unimplemented)
        assert (error.status, feature in error.message) == (501, True)
    await api.create("m-2")
    for method, path in (("POST", "mounts"), ("DELETE", "mounts/x")):
        error = await api.fails(method, f"/machines/m-2/{path}")
        assert isinstance(error, Unimplemented), path
        assert isinstance(await api.fails(method, f"/machines/none/{path}"), MachineNotFound)
    assert await api.call("GET", "/machines/m-2/mounts") == {"mounts": []}


async def test_relays_are_ports_of_the_host(api: MachineApi):
    ports = {port["name"]: port.get("host_port", 0) for port in (await api.create())["ports"]}
    assert ports["ssh"] != ports["vnc"]
    assert all(20_000 <= ports[name] <= 39_999 for name in ("ssh", "vnc"))
    assert ports["exec"] == 0
    for _ in range(2):
        machine = (await api.call("POST", "/machines/m-1/exec-relay"))["machine"]
        again = {port["name"]: port["host_port"] for port in machine["ports"]}
        assert again | {"exec": 0} == ports
        assert 20_000 <= again["exec"] <= 39_999
    assert await api.call("GET", "/machines/m-1/published-ports") == {"ports": []}
    await api.call("POST", "/machines/m-1/stop", status=204)
    assert isinstance(await api.fails("POST", "/machines/m-1/exec-relay"), WrongState)
    started = (await api.call("POST", "/machines/m-1/start"))["machine"]
    assert {port["name"]: port["host_port"] for port in started["ports"]} == again
    assert isinstance(await api.fails("POST", "/machines/none/exec-relay"), MachineNotFound)


async def test_without_root_all_relays_are_there_from_the_start(api: MachineApi):
    """QEMU's user network forwards what it was told at its start."""
    known = api.daemon._identification
    api.daemon._identification = msgspec.structs.replace(known, isolation=Isolation.USER_NETWORK)
    ports = (await api.create())["ports"]
    assert all(20_000 <= port["host_port"] <= 39_999 for port in ports)
    assert (await api.call("POST", "/machines/m-1/exec-relay"))["machine"]["ports"] == ports


async def test_a_second_machine_of_an_id_is_a_conflict(api: MachineApi, importer: Importer):
    await api.call("POST", "/machines", BODY, 201)
    assert isinstance(await api.fails("POST", "/machines", BODY), MachineExists)
    assert importer.asked == [("https://h/rootfs.ext4", None)]  # nothing is fetched for what cannot be
    await api.call("DELETE", "/machines/m-1", status=204)
    await api.call("POST", "/machines", BODY, 201)


async def test_two_creates_of_an_id_at_once_make_one_machine(api: MachineApi, importer: Importer):
    answers = await asyncio.gather(*(api.raw("POST", "/machines", BODY) for _ in range(4)))
    assert sorted(status for status, _ in answers) == [201, 409, 409, 409]
    assert len(api.daemon.machines.records()) == 1


async def test_the_digest_of_an_artifact_is_passed_on(api: MachineApi, importer: Importer):
    body = {**BODY, "artifact": {**ARTIFACT, "rootfs_sha256": "cd" * 32}}
    await api.call("POST", "/machines", body, 201)
    assert importer.asked == [("https://h/rootfs.ext4", "cd" * 32)]


async def test_an_artifact_becomes_an_image_or_says_why_not(api: MachineApi, tmp_path: Path):
    """The importer of the host, and a server on the loopback, which is no public address."""
    rootfs = tmp_path / "made.ext4"
    await run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", rootfs, "4M"], timeout_s=60)
    content = rootfs.read_bytes()
    images = ImageStore(tmp_path / "data")
    async with file_server.serving(lambda _target, _headers: file_server.ok(content)) as server:

        async def create(**more: Any) -> Any:
            artifact = {**ARTIFACT, "rootfs_url": server.url("/rootfs.ext4"), **more}
            return await api.raw("POST", "/machines", {**BODY, "artifact": artifact})

        async def reason(**more: Any) -> str:
            return json.loads((await create(**more))[1])["details"]["reason"]

        assert await reason() == "address_refused"
        config = msgspec.structs.replace(api.daemon.config, artifact_networks=("127.0.0.0/8",), disk_reserve_bytes=0)
        api.daemon.artifacts = make_importer(config, images)
        assert await reason(rootfs_sha256="ab" * 32) == "digest_mismatch"
        assert api.world.leftovers == (set(), set(), set())
        status, answer = await create(rootfs_sha256=hashlib.sha256(content).hexdigest())
        assert (status, json.loads(answer)["machine"]["phase"]) == (201, "running")
        (image,) = await images.load_all()
        assert api.daemon.machines.record("m-1").spec.image == image.digest


async def test_a_guest_that_does_not_get_ready_is_a_failed_machine(api: MachineApi):
    api.world.driver.is_impostor = True
    machine = await api.create()
    assert (machine["phase"], "another guest" in machine["error"]) == ("failed", True)
    assert api.world.leftovers == (set(), set(), set())
    api.world.driver.is_impostor = False
    assert isinstance(await api.fails("POST", "/machines/m-1/start"), WrongState)
    await api.call("POST", "/machines/m-1/stop", status=204)
    assert (await api.call("POST", "/machines/m-1/start"))["machine"]["phase"] == "running"
    await api.call("DELETE", "/machines/m-1", status=204)
    assert api.world.leftovers == (set(), set(), set())


async def test_a_machine_for_which_there_is_no_room_is_not_made(api: MachineApi):
    error = await api.fails("POST", "/machines", {"machine_id": "m-1", "image": "debian-12", "memory_mib": 1 << 20})
    assert (isinstance(error, HostFull), error.status) == (True, 503)
    assert (await api.fails("POST", "/machines", {"machine_id": "m-1", "image": "missing"})).reason == "image_not_found"
    assert await api.call("GET", "/machines") == {"machines": [], "tombstones": 0}


# -- logging in --------------------------------------------------------------------------------------------------------


async def test_the_guest_gets_a_key_of_its_own_and_those_of_its_users(api: MachineApi):
    ca = KEY.replace("someone", "ca")
    api.daemon.config = msgspec.structs.replace(api.daemon.config, login_ca=ca)
    config = {"authorized_keys": [KEY], "trusted_user_ca_keys": [KEY]}
    first = await api.create("m-1", guest_config=config)
    second = await api.create("m-2", guest_config=config)
    assert first["guest_ssh_host_public_key"] != second["guest_ssh_host_public_key"]
    login = api.world.driver.processes["m-1"].agent.configured[-1].login
    assert login is not None
    assert (login.authorized_keys, login.trusted_user_ca_keys) == ((KEY,), (ca, KEY))
    assert login.host_public_key == first["guest_ssh_host_public_key"]
    private = load_ssh_private_key(login.host_key.encode(), None)
    assert private.public_key() == load_ssh_public_key(login.host_public_key.encode())


async def test_the_key_stays_the_same_over_stop_and_start(api: MachineApi):
    machine = await api.create()
    await api.call("POST", "/machines/m-1/stop", status=204)
    assert "ports" not in (await api.call("GET", "/machines/m-1"))["machine"]
    again = (await api.call("POST", "/machines/m-1/start"))["machine"]
    assert again["guest_ssh_host_public_key"] == machine["guest_ssh_host_public_key"]
    assert again["generation"] == 2


async def test_a_guest_with_another_host_key_is_not_the_one_that_was_made(api: MachineApi):
    driver = api.world.driver
    boot = driver.boot

    async def swapped(plan):
        vmm = await boot(plan)
        driver.processes[plan.machine_id].agent.host_public_key = "ssh-ed25519 other"
        return vmm

    driver.boot = swapped
    machine = await api.create()
    assert (machine["phase"], "SSH host key" in machine["error"]) == ("failed", True)


async def test_secrets_are_in_no_answer_and_in_no_file_that_others_read(api: MachineApi):
    await api.create(guest_config={"authorized_keys": [KEY]})
    for target in ("/machines", "/machines/m-1", "/state", "/metrics"):
        _, content = await api.raw("GET", target)
        assert b"PRIVATE KEY" not in content
        assert b'host_key"' not in content
    journal = api.world.root / "data" / "journal.db"
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    assert b"PRIVATE KEY" in journal.read_bytes() + (journal.parent / "journal.db-wal").read_bytes()


async def test_a_daemon_that_starts_again_knows_its_machines_by_their_keys(world: World):
    login = Login(host_key="private", host_public_key="ssh-ed25519 public")
    async with world.daemon() as daemon:
        await daemon.machines.create(order("m-1"), None, Contract(login=login))
        await daemon.machines.create(order("m-2"), None, Contract(login=login))
    world.driver.processes["m-2"].agent.host_public_key = "ssh-ed25519 other"
    async with world.daemon() as daemon:
        await until(lambda: daemon.machines.record("m-2").phase.value == "failed")
        assert "SSH host key" in daemon.machines.record("m-2").error
        await daemon.machines.guest("m-1", None)
        assert daemon.machines.record("m-1").contract == Contract(login=login)
        assert await daemon.machines.stop("m-1", None)


# -- whose machines ----------------------------------------------------------------------------------------------------


async def test_no_control_plane_touches_them_and_they_touch_none_of_its(api: MachineApi):
    await api.create()
    spec = msgspec.to_builtins(SPEC)
    await api.raw("POST", "/machines", {"machine_id": "m-2", "spec": spec}, fence_headers(fence()))
    foreign = fence_headers(Fence(cluster="c1", uid="m-1", incarnation=9, action_seq=9))
    requests = [("DELETE", ""), ("POST", "/stop"), ("POST", "/start"), ("POST", "/resize"), ("POST", "/exec")]
    for method, path in [*requests, ("POST", "/files/ops")]:
        body = {"command": ["true"], "operation": "list"} if method == "POST" else None
        assert isinstance(await api.fails(method, f"/machines/m-1{path}", body, foreign), WrongCluster), path
        assert isinstance(await api.fails(method, f"/machines/m-2{path}", body), WrongCluster), path


async def test_a_control_plane_can_read_the_list_with_them_in_it(api: MachineApi):
    gate = api.world.driver.holds.hold("boot")
    creating = asyncio.create_task(api.create())
    await api.world.driver.holds.reached("boot").wait()
    _, content = await api.raw("GET", "/machines")
    assert json.loads(content)["machines"][0]["phase"] == "starting"
    assert msgspec.json.decode(content, type=MachineList).machines[0].phase.value == "creating"
    gate.set()
    await creating


# -- stop, start, resize, delete, exec ---------------------------------------------------------------------------------


async def test_stop_start_and_delete_can_be_repeated(api: MachineApi):
    await api.create()
    await api.files("write_text", path="kept", content="x")
    for _ in range(2):
        await api.call("POST", "/machines/m-1/stop", status=204)
    for _ in range(2):
        assert (await api.call("POST", "/machines/m-1/start"))["machine"]["phase"] == "running"
    assert await api.files("exists", path="kept") == {"exists": True}
    for _ in range(2):
        await api.call("DELETE", "/machines/m-1", status=204)
    assert isinstance(await api.fails("GET", "/machines/m-1"), MachineNotFound)
    for path in ("start", "stop", "resize"):
        assert isinstance(await api.fails("POST", f"/machines/m-1/{path}"), MachineNotFound)


async def test_a_resize_stops_what_runs_and_grows_the_disk(api: MachineApi):
    await api.create()
    body = {"memory_mib": 4096, "storage_bytes": 20 * GIB}
    assert (await api.call("POST", "/machines/m-1/resize", body))["machine"]["phase"] == "stopped"
    assert api.world.quarters.sizes == {"m-1": 20 * GIB}
    usage = await api.daemon.journal.usage()
    assert (usage.disk_bytes, usage.active) == (20 * GIB, 0)
    assert (await api.call("POST", "/machines/m-1/start"))["machine"]["spec"]["memory_mib"] == 4096
    assert api.world.driver.processes["m-1"].plan.memory_mib == 4096
    assert (await api.daemon.journal.usage()).memory_mib == 4096


async def test_a_resize_to_what_it_is_changes_nothing(api: MachineApi):
    await api.create()
    for body in ({}, {"memory_mib": 0, "storage_bytes": -1}, {"memory_mib": 3072, "storage_bytes": 10 * GIB}):
        assert (await api.call("POST", "/machines/m-1/resize", body))["machine"]["phase"] == "running"


async def test_a_resize_that_cannot_be_leaves_no_intent(api: MachineApi):
    await api.create()
    for body in ({"storage_bytes": 9 * GIB}, {"memory_mib": 1}, {"storage_bytes": 1 << 60}):
        assert isinstance(await api.fails("POST", "/machines/m-1/resize", body), BadField), body
    for body in ({"memory_mib": 1 << 30}, {"storage_bytes": 4 << 40}):
        limits = api.world.quarters.limits_now
        api.world.quarters.limits_now = msgspec.structs.replace(limits, disk_bytes=100 * GIB)
        assert isinstance(await api.fails("POST", "/machines/m-1/resize", body), HostFull), body
    assert await api.daemon.journal.operation("m-1") is None
    assert (await api.call("GET", "/machines/m-1"))["machine"]["phase"] == "running"


async def test_only_what_runs_or_is_stopped_is_resized(api: MachineApi):
    api.world.driver.is_impostor = True
    await api.create()
    assert isinstance(await api.fails("POST", "/machines/m-1/resize", {"memory_mib": 4096}), WrongState)


async def test_a_resize_that_a_crash_cut_off_is_finished(world: World):
    async with world.daemon() as daemon:
        await daemon.machines.create(order(), None)
        world.quarters.holds.hold("grow")
        resizing = asyncio.create_task(daemon.machines.resize("m-1", None, Size(disk_bytes=2 * GIB)))
        await world.quarters.holds.reached("grow").wait()
    await asyncio.gather(resizing, return_exceptions=True)
    world.quarters.holds = type(world.quarters.holds)()
    async with world.daemon() as daemon:
        async with asyncio.timeout(60):
            while await daemon.journal.operation("m-1") is not None:
                await asyncio.sleep(0.002)
        assert daemon.machines.record("m-1").phase.value == "stopped"
        assert world.quarters.sizes == {"m-1": 2 * GIB}


async def test_commands_run_as_the_contracts_user(api: MachineApi):
    await api.create()
    agent = api.world.driver.processes["m-1"].agent
    asked = []
    run = agent.duties.run
    agent.duties.run = lambda request, env: asked.append(request.user) or run(request, env)
    answer = await api.call("POST", "/machines/m-1/exec", {"command": ["echo", "hi"]})
    assert (answer["exit_code"], answer["stdout"], answer["stderr"]) == (0, "hi\n", "")
    await api.call("POST", "/machines/m-1/exec", {"command": ["echo", "hi"], "user": "root"})
    assert asked == ["node", "root"]


async def test_a_command_whose_machine_dies_is_no_success(api: MachineApi):
    await api.create()
    running = asyncio.create_task(api.fails("POST", "/machines/m-1/exec", {"command": ["hang"]}))
    process = api.world.driver.processes["m-1"]
    await until(lambda: "POST /exec" in process.agent.requests)
    process.end("killed by SIGKILL")
    error = await running
    assert (error.reason, error.status) == ("guest_unreachable", 503)


# -- the host ----------------------------------------------------------------------------------------------------------


async def test_curl_reaches_it_on_the_socket(api: MachineApi):
    """As docs/machine-api.md says; its lines themselves are run by tests/real/test_export_block.py."""
    root = api.path.parent

    async def curl(line: str) -> tuple[str, int]:
        words = shlex.split(line.replace("$FIRECRACKER_HOST_ROOT_DIR", str(root)))
        program = await asyncio.create_subprocess_exec(*words, "-sS", "-w", "\n%{http_code}", stdout=-1)
        out, _ = await program.communicate()
        body, _, status = out.decode().rpartition("\n")
        return body, int(status)

    socket = '--unix-socket "$FIRECRACKER_HOST_ROOT_DIR/firecracker-host.sock"'
    assert await curl(f"curl {socket} http://localhost/health") == ('{"ok":true}', 200)
    body = json.dumps({"machine_id": "m-1", "image": "debian-12"})
    made, status = await curl(f"curl {socket} -X POST http://localhost/machines -d {shlex.quote(body)}")
    assert (status, json.loads(made)["machine"]["phase"]) == (201, "running")
    listed, _ = await curl(f"curl {socket} http://localhost/machines")
    assert [machine["id"] for machine in json.loads(listed)["machines"]] == ["m-1"]
    report, _ = await curl(f"curl {socket} http://localhost/storage/report")
    assert "pools" in json.loads(report)["report"]
    assert await curl(f"curl {socket} -X DELETE http://localhost/machines/m-1") == ("", 204)


def test_every_route_of_the_contract_has_a_handler():
    assert set(CONTRACT_HANDLERS) == {route.name for route in CONTRACT_ROUTES}
