"""Create, get, list, delete and drain, over HTTP against fake hosts."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from control_harness import Running, leave, running, until

from fusevm.control.config import ControlConfig
from fusevm.core.policy import Policy
from fusevm.model.environment import Environment
from fusevm.model.errors import BootFailed, HostFull
from fusevm.model.host import Resources
from fusevm.testing.fake_host import FakeHost, lose_reply


async def test_a_created_environment_runs_with_the_defaults_that_were_booked() -> None:
    async with running() as server:
        made = await server.create()
        assert made["state"] == "running"
        assert made["id"] == "fuse-t1"
        assert made["url"] == ""
        assert made["egress"] == {"mode": "direct"}
        assert made["spec"] == {
            "cpus": 1,
            "ram_mb": 512,
            "storage_gb": 4,
            "image": "debian-12",
            "max_runtime_seconds": 7200,
        }
        host = (await server.http.get("/v1/hosts/h1")).json()
        assert host["allocated"] == {"cpus": 1, "ram_mb": 512, "storage_gb": 4, "vm_count": 1}
        machine = next(iter(server.host.table.values()))
        assert (machine.spec.memory_mib, machine.spec.disk_bytes) == (512, 4 << 30)


async def test_zero_null_and_empty_mean_unset() -> None:
    body = {"spec": {"cpus": 0, "ram_mb": None, "storage_gb": 0, "image": "", "labels": {}}, "files": {}, "expose": []}
    async with running() as server:
        made = await server.create(**body)
        assert made["spec"]["cpus"] == 1
        assert made["spec"]["image"] == "debian-12"


@pytest.mark.parametrize("task_id", ["A_b.C", "a", "0", "x" * 128, "Ab-c_d.9"])
async def test_a_task_id_is_kept_as_given_and_survives_reconciliation(task_id: str) -> None:
    async with running() as server:
        made = await server.create(task_id)
        cycles = server.host.count("machines")
        await until(lambda: server.host.count("machines") > cycles + 3)
        assert made["task_id"] == task_id
        assert (await server.get(task_id)).json()["state"] == "running"


@pytest.mark.parametrize("task_id", ["", ".a", "a/b", "a b", "x" * 129, "ä"])
async def test_a_bad_task_id_is_refused(task_id: str) -> None:
    async with running() as server:
        answer = await server.http.post("/v1/environments", json={"task_id": task_id})
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (400, "bad_task_id")


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"cpus": -1}, "spec.cpus"),
        ({"cpus": 33}, "spec.cpus"),
        ({"ram_mb": 64}, "spec.ram_mb"),
        ({"max_runtime_seconds": "soon"}, "spec.max_runtime_seconds"),
        ({"idle_timeout_seconds": 5}, "spec.idle_timeout_seconds"),
        ({"arch": "mips"}, "spec.arch"),
    ],
)
async def test_sizes_out_of_bounds_are_refused_by_name(spec: dict[str, object], field: str) -> None:
    async with running() as server:
        answer = await server.http.post("/v1/environments", json={"task_id": "t", "spec": spec})
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, field)
        assert server.host.table == {}


async def test_unlimited_runtime_is_possible() -> None:
    async with running() as server:
        made = await server.create(spec={"max_runtime_seconds": "unlimited"})
        assert made["spec"]["max_runtime_seconds"] == -1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"desktop": {"width": 640, "height": 480}}, "desktop"),
        # {"version": "1", "services": {"db": {}}}
        ({"manifest_inline": "eyJ2ZXJzaW9uIjogIjEiLCAic2VydmljZXMiOiB7ImRiIjoge319fQ=="}, "services"),
        ({"spec": {"gpus": 1}}, "spec.gpus"),
        ({"spec": {"huge_pages": True}}, "spec.huge_pages"),
        ({"egress": {"mode": "proxy"}}, "proxy"),
        ({"on_host_loss": "restore"}, "snapshots cannot leave their host yet"),
    ],
)
async def test_what_cannot_be_honoured_is_named_in_a_501(body: dict[str, object], field: str) -> None:
    async with running() as server:
        answer = await server.http.post("/v1/environments", json={"task_id": "t", **body})
        assert answer.status_code == 501
        assert answer.json()["error"]["code"] == "unimplemented"
        assert field in answer.json()["error"]["message"]


@pytest.mark.parametrize("asked", [{}, {"on_host_loss": ""}, {"on_host_loss": "fail"}])
async def test_an_environment_fails_with_its_host_and_says_so_beforehand(asked: dict[str, str]) -> None:
    async with running() as server:
        made = await server.create(**asked)
        assert made["on_host_loss"] == (await server.get()).json()["on_host_loss"] == "fail"


async def test_another_wish_for_the_loss_of_a_host_is_a_mistake() -> None:
    async with running() as server:
        answer = await server.http.post("/v1/environments", json={"task_id": "t", "on_host_loss": "migrate"})
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "on_host_loss")


async def test_unknown_fields_are_named_in_a_warning() -> None:
    async with running() as server:
        body = {"task_id": "t", "memory_mb": 1, "spec": {"ram": 5}}
        answer = await server.http.post("/v1/environments", json=body)
        assert answer.status_code == 201
        assert answer.headers["warning"] == '299 - "unknown fields ignored: memory_mb, spec.ram"'


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"task_id": 5}', b"{}", b'{"task_id":"t","spec":{"cpus":"many"}}', b"\xff"]
)
async def test_a_body_that_does_not_fit_is_bad_json(body: bytes) -> None:
    async with running() as server:
        answer = await server.http.post("/v1/environments", content=body)
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (400, "bad_json")


async def test_a_second_environment_of_a_live_task_is_a_conflict() -> None:
    async with running() as server:
        await server.create()
        again = await server.http.post("/v1/environments", json={"task_id": "t1"})
        assert (again.status_code, again.json()["error"]["details"]["reason"]) == (409, "task_exists")


async def test_many_creates_of_one_task_at_once_make_one() -> None:
    async with running() as server:
        posts = (server.http.post("/v1/environments", json={"task_id": "t"}) for _ in range(20))
        codes = sorted(answer.status_code for answer in await asyncio.gather(*posts))
        assert codes == [201] + [409] * 19
        assert len(server.host.table) == 1


async def test_a_create_answers_with_provisioning_when_the_wait_is_over() -> None:
    async with running(wait_s=0.05) as server:
        server.host.hold["create"] = asyncio.Event()
        made = await server.create()
        assert made["state"] == "provisioning"
        server.host.hold["create"].set()
        await until(lambda: _state(server, "t1", "running"))


async def test_an_asynchronous_create_answers_at_once() -> None:
    async with running() as server:
        server.host.hold["create"] = asyncio.Event()
        answer = await server.http.post("/v1/environments", json={"task_id": "t"}, headers={"Prefer": "respond-async"})
        assert (answer.status_code, answer.json()["state"]) == (202, "provisioning")
        server.host.hold["create"].set()
        await until(lambda: _state(server, "t", "running"))


async def test_a_client_that_leaves_does_not_stop_its_create() -> None:
    async with running() as server:
        server.host.hold["create"] = asyncio.Event()
        creating = server.http.post("/v1/environments", json={"task_id": "t"})
        await leave(creating, lambda: server.host.count("create") == 1)
        server.host.hold["create"].set()
        await until(lambda: _state(server, "t", "running"))


async def test_an_ended_environment_is_told_apart_from_an_unknown_one() -> None:
    async with running() as server:
        made = await server.create()
        assert (await server.delete()).status_code == 204
        ended = (await server.get()).json()["error"]
        assert (ended["code"], ended["details"]["reason"]) == ("not_found", "ended")
        assert ended["details"]["uid"] == made["uid"]
        shown = (await server.get(uid=made["uid"])).json()
        assert (shown["state"], shown["reason"], shown["uid"]) == ("destroyed", "deleted", made["uid"])
        assert shown["ended_at"]
        assert (await server.delete()).status_code == 404
        unknown = await server.get("t2")
        assert (unknown.status_code, unknown.json()["error"]["details"]["reason"]) == (404, "environment_not_found")
        other = await server.get("t2", uid=made["uid"])
        assert other.status_code == 404


async def test_a_task_id_can_be_used_again_after_the_end() -> None:
    async with running() as server:
        first = await server.create()
        await server.delete()
        second = await server.create()
        assert first["uid"] != second["uid"]
        assert (await server.get()).json()["uid"] == second["uid"]
        assert (await server.get(uid=first["uid"])).json()["state"] == "destroyed"


async def test_a_delete_waits_for_the_host() -> None:
    async with running(wait_s=0.05) as server:
        await server.create()
        server.host.hold["destroy"] = asyncio.Event()
        first = await server.delete()
        assert (first.status_code, first.json()["state"]) == (202, "destroying")
        again = await server.delete()
        assert (again.status_code, again.json()["state"]) == (202, "destroying")
        conflict = await server.http.post("/v1/environments", json={"task_id": "t1"})
        assert conflict.status_code == 409
        server.host.hold["destroy"].set()
        await until(lambda: _gone(server, "t1"))


async def test_an_asynchronous_delete_answers_at_once() -> None:
    async with running() as server:
        await server.create()
        server.host.hold["destroy"] = asyncio.Event()
        answer = await server.http.delete("/v1/environments/fuse-t1", headers={"Prefer": "wait=1, respond-async"})
        assert answer.status_code == 202
        server.host.hold["destroy"].set()
        await until(lambda: _gone(server, "t1"))


async def test_a_delete_of_another_uid_does_nothing() -> None:
    async with running() as server:
        first = await server.create()
        await server.delete()
        await server.create()
        old = await server.http.delete("/v1/environments/fuse-t1", params={"uid": first["uid"]})
        assert (old.status_code, old.json()["error"]["details"]["reason"]) == (404, "ended")
        assert (await server.get()).json()["state"] == "running"


async def test_a_client_that_leaves_does_not_stop_its_delete() -> None:
    async with running() as server:
        await server.create()
        server.host.hold["destroy"] = asyncio.Event()
        await leave(server.delete(), lambda: server.host.count("destroy") == 1)
        server.host.hold["destroy"].set()
        await until(lambda: _gone(server, "t1"))


async def test_a_delete_does_not_wait_for_a_boot() -> None:
    async with running() as server:
        server.host.hold["create"] = asyncio.Event()
        await server.http.post("/v1/environments", json={"task_id": "t1"}, headers={"Prefer": "respond-async"})
        await until(lambda: server.host.count("create") == 1)
        assert (await server.delete()).status_code == 204
        server.host.hold["create"].set()
        assert server.host.count("create") == 1
        assert server.host.table == {}


async def test_a_waiting_create_learns_that_it_was_deleted() -> None:
    async with running() as server:
        server.host.hold["create"] = asyncio.Event()
        creating = asyncio.ensure_future(server.http.post("/v1/environments", json={"task_id": "t1"}))
        await until(lambda: server.host.count("create") == 1)
        assert (await server.delete()).status_code == 204
        answer = await creating
        assert (answer.status_code, answer.json()["error"]["details"]["reason"]) == (404, "ended")
        assert "(destroyed: deleted)" in answer.json()["error"]["message"]


async def test_a_refused_boot_ends_as_failed_with_its_reason() -> None:
    async with running() as server:
        server.host.script("create", BootFailed(id="m", problem="kernel panic"))
        made = await server.create_ends()
        assert made["reason"] == "boot_failed"
        await until(lambda: _gone(server, "t1"))
        shown = (await server.get(uid=made["uid"])).json()
        assert (shown["state"], shown["reason"]) == ("failed", "boot_failed")
        assert server.host.table == {}
        host = (await server.http.get("/v1/hosts/h1")).json()
        assert host["allocated"]["vm_count"] == 0


async def test_a_lost_reply_to_a_create_is_asked_for_again() -> None:
    async with running(policy=Policy(backoff_first_ms=10)) as server:
        server.host.script("create", lose_reply, HostFull(resource="memory", needed="1", free="0"))
        made = await server.create()
        assert made["state"] == "running"
        assert server.host.count("create") == 3
        assert len(server.host.table) == 1


async def test_a_lost_reply_to_a_destroy_is_asked_for_again() -> None:
    async with running(policy=Policy(backoff_first_ms=10)) as server:
        await server.create()
        server.host.script("destroy", lose_reply)
        assert (await server.delete()).status_code == 204
        assert server.host.count("destroy") == 2


async def test_lists_have_filters_and_pages() -> None:
    async with running(FakeHost("h1"), FakeHost("h2")) as server:
        for number in range(5):
            await server.create(f"t{number}", spec={"host_id": "h1" if number % 2 else "h2"})
        await server.act("t0", "drain")
        await server.delete("t4")

        async def ids(**params: str) -> list[str]:
            answer = (await server.http.get("/v1/environments", params=params)).json()
            return [env["task_id"] for env in answer["environments"]]

        assert await ids() == ["t0", "t1", "t2", "t3"]
        assert await ids(host_id="h1") == ["t1", "t3"]
        assert await ids(task_id="t2") == ["t2"]
        assert await ids(state="draining") == ["t0"]
        assert await ids(state="running", host_id="h2") == ["t2"]
        assert await ids(ended="true") == ["t4"]
        assert await ids(state="destroyed") == ["t4"]
        page = (await server.http.get("/v1/environments", params={"limit": "3"})).json()
        assert [env["task_id"] for env in page["environments"]] == ["t0", "t1", "t2"]
        params = {"limit": "3", "cursor": page["next_cursor"]}
        last = (await server.http.get("/v1/environments", params=params)).json()
        assert [env["task_id"] for env in last["environments"]] == ["t3"]
        assert "next_cursor" not in last
        for params in ({"cursor": "!"}, {"cursor": "e30"}, {"state": "asleep"}, {"ended": "perhaps"}):
            assert (await server.http.get("/v1/environments", params=params)).status_code == 400


@pytest.mark.parametrize("limit", ["0", "-1", "many", "1000"])
async def test_a_strange_limit_means_the_default_or_the_most(limit: str) -> None:
    async with running() as server:
        assert (await server.http.get("/v1/environments", params={"limit": limit})).status_code == 200


async def test_a_drained_environment_keeps_its_machine_until_it_is_deleted() -> None:
    async with running() as server:
        await server.create()
        drained = await server.act("t1", "drain")
        assert (drained.status_code, drained.json()["state"]) == (200, "draining")
        assert (await server.act("t1", "drain")).json()["state"] == "draining"
        assert len(server.host.table) == 1
        refused = await server.act("t1", "exec", {"cmd": ["true"]})
        assert (refused.status_code, refused.json()["error"]["details"]["reason"]) == (409, "wrong_state")
        assert (await server.delete()).status_code == 204


async def test_only_a_running_environment_is_drained() -> None:
    async with running(wait_s=0.05) as server:
        server.host.hold["create"] = asyncio.Event()
        await server.create()
        assert (await server.act("t1", "drain")).status_code == 409
        server.host.hold["create"].set()


async def test_placement_says_why_there_is_no_room() -> None:
    small = FakeHost("small", capacity=Resources(cpus=1, ram_mb=1024, storage_gb=10, vm_count=1), images=["debian-12"])
    async with running(small) as server:
        await server.create("t1")
        full = (await server.http.post("/v1/environments", json={"task_id": "t2"})).json()["error"]
        assert (full["code"], full["details"]["reason"]) == ("unavailable", "no_capacity")
        assert "1 machine_count" in full["message"]
        image = {"task_id": "t3", "spec": {"image": "plan-9"}}
        assert (await server.http.post("/v1/environments", json=image)).json()["error"]["code"] == "invalid_argument"
        pinned = {"task_id": "t4", "spec": {"host_id": "nowhere"}}
        assert (await server.http.post("/v1/environments", json=pinned)).status_code == 404


async def test_many_creates_at_once_never_book_beyond_a_host() -> None:
    hosts = [FakeHost(f"h{n}", capacity=Resources(cpus=99, ram_mb=512 * 5, storage_gb=99, vm_count=9)) for n in (1, 2)]
    async with running(*hosts) as server:
        posts = (server.http.post("/v1/environments", json={"task_id": f"t{n}"}) for n in range(20))
        codes = sorted(answer.status_code for answer in await asyncio.gather(*posts))
        assert codes == [201] * 10 + [503] * 10
        assert [len(host.table) for host in hosts] == [5, 5]


async def _state(server: Running, task_id: str, state: str) -> bool:
    return bool((await server.get(task_id)).json().get("state") == state)


async def _gone(server: Running, task_id: str) -> bool:
    return bool((await server.get(task_id)).status_code == 404)


async def test_create_and_delete_wait_as_long_as_the_config_says() -> None:
    async with running(wait_s=ControlConfig().wait_s) as server:
        waits: list[float] = []
        wait_for = server.plane.entry.wait_for

        async def recording(
            record: Environment, is_done: Callable[[Environment], bool], timeout_s: float, **rest: Any
        ) -> Environment:
            waits.append(timeout_s)
            return await wait_for(record, is_done, timeout_s, **rest)

        server.plane.entry.wait_for = recording  # type: ignore[method-assign]
        await server.create()
        assert (await server.delete()).status_code == 204
        assert waits == [55.0, 55.0]


async def test_create_and_delete_answer_at_the_end_of_their_wait() -> None:
    host = FakeHost("h1")
    host.hold["create"], host.hold["destroy"] = asyncio.Event(), asyncio.Event()
    async with running(host, wait_s=0.3) as server:
        began = asyncio.get_running_loop().time()
        assert (await server.create())["state"] == "provisioning"
        assert (await server.delete()).status_code == 202
        assert asyncio.get_running_loop().time() - began >= 0.6
        for hold in host.hold.values():
            hold.set()
