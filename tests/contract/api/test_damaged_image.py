"""An image that was damaged after the control plane had heard of it: the waiting create tells what to do."""

from control_harness import running, until

from fusevm.model.errors import ImageCorrupt

DAMAGE = ImageCorrupt(image="debian-12", path="/data/images/x/rootfs.ext4", problem="it is no ext4 file system")


async def test_a_create_of_a_damaged_image_is_answered_with_reason_and_remedy() -> None:
    async with running() as server:
        server.host.script("create", DAMAGE)
        answer = await server.http.post("/v1/environments", json={"task_id": "t1", "spec": {"image": "debian-12"}})
        error = answer.json()["error"]
        assert (answer.status_code, error["details"]["reason"]) == (DAMAGE.status, "image_corrupt")
        assert error["message"] == DAMAGE.message
        assert "make it anew with `fuse image build --force debian-12`" in error["message"]
        assert error["details"]["id"] == "fuse-t1"


async def test_the_reason_and_the_remedy_can_be_asked_for_after_the_end() -> None:
    async with running() as server:
        server.host.script("create", DAMAGE)
        made = await server.create_ends()

        async def has_ended() -> bool:
            return (await server.get(uid=made["uid"])).json()["state"] == "failed"

        await until(has_ended)
        shown = (await server.get(uid=made["uid"])).json()
        assert (shown["reason"], shown["error"]) == ("image_corrupt", DAMAGE.message)
        assert server.host.count("create") == 1, "a repetition cannot cure it"
        assert server.host.table == {}
