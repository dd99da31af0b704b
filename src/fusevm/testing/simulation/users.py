"""Simulated users: each wants one environment, uses it, and deletes or forgets it. They hang up, ask again with the
same Idempotency-Key, ask another replica, and come back under the same task."""

import asyncio
import contextlib
from collections.abc import Sequence
from random import Random
from typing import Any

from fusevm.testing.simulation.checker import Checker
from fusevm.testing.simulation.replica import Answer, Gone, Replica

#: A user gives up after this many attempts at one thing.
ATTEMPTS = 8
_OVER = frozenset({404, 410})
#: The only fault of their own that users meet: hosts refuse a boot for it (`Luck.refused_boot`).
_BAD_LUCK = frozenset({"image_not_found"})
#: What a create under a key never meets, unless it acts twice.
_TWICE = frozenset({"task_exists", "idempotency_key_reused"})


class Crowd:
    """What all users share."""

    def __init__(self, replicas: Sequence[Replica], checker: Checker, chance: Random) -> None:
        self.replicas = replicas
        self.checker = checker
        self.chance = chance
        #: Snapshots that somebody was told of.
        self.snapshots: list[str] = []
        self.answers: dict[int, int] = {}
        self._keys = 0

    async def ask(self, method: str, path: str, *, key: str = "", wait: bool = True, **options: Any) -> Answer:
        """One request to some replica. Raises Gone."""
        headers = {"idempotency-key": key} if key else {}
        if not wait:
            headers["prefer"] = "respond-async"
        patience_s = self.chance.uniform(1.0, 60.0)
        replica = self.chance.choice(self.replicas)
        answer = await replica.ask(method, path, headers=headers, patience_s=patience_s, **options)
        self.answers[answer.status] = self.answers.get(answer.status, 0) + 1
        is_mistaken = answer.status == 400 and answer.reason not in _BAD_LUCK
        if is_mistaken or answer.reason == "internal":
            self.checker.broken(replica.name, f"{method} {path} was answered with {answer.body}")
        return answer

    def new_key(self) -> str:
        """An Idempotency-Key."""
        self._keys += 1
        return f"key-{self._keys}"


class User:
    """One user and its environment."""

    def __init__(self, crowd: Crowd, task_id: str) -> None:
        self._crowd = crowd
        self._chance = crowd.chance
        self._task_id = task_id
        self._path = f"/v1/environments/fuse-{task_id}"
        self._snapshots: list[str] = []
        #: Nobody else makes environments of this task.
        self._had_one = False

    async def live(self, begin_s: float, end_s: float) -> None:
        """Come at `begin_s`, and be gone by about `end_s`."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(begin_s)
        if not await self._create():
            return
        for _ in range(self._chance.randrange(0, 8)):
            await asyncio.sleep(self._chance.expovariate(1 / 12))
            if loop.time() > end_s:
                break
            await self._use()
        if self._chance.random() < 0.7:
            await self._delete()
            if self._chance.random() < 0.1 and loop.time() < end_s and await self._create():
                await self._delete()

    # -- create ---------------------------------------------------------------------------------------------------

    async def _create(self) -> bool:
        crowd, body = self._crowd, self._wish()
        key = crowd.new_key() if self._chance.random() < 0.7 else ""
        for _ in range(ATTEMPTS):
            try:
                answer = await crowd.ask(
                    "POST", "/v1/environments", key=key, wait=self._chance.random() < 0.5, body=body
                )
            except Gone:
                if not key and await self._is_there():
                    self._had_one = True
                    return True
            else:
                if answer.status in (201, 202):
                    crowd.checker.told(answer.body["uid"], self._task_id, key)
                    self._had_one = True
                    return True
                if answer.status in (404, 409, 501) and answer.reason != "idempotency_in_progress":
                    if key and not self._had_one and answer.reason in _TWICE:
                        crowd.checker.broken("", f"the create of {self._task_id} under {key} got {answer.reason}")
                    return False
            await asyncio.sleep(self._chance.uniform(0.5, 10.0))
        return False

    def _wish(self) -> dict[str, Any]:
        chance = self._chance
        spec: dict[str, Any] = {"max_runtime_seconds": chance.randrange(60, 400) if chance.random() < 0.8 else 7_200}
        if chance.random() < 0.1:
            spec["idle_timeout_seconds"] = chance.randrange(60, 120)
        if chance.random() < 0.3:
            spec |= {"cpus": 2, "ram_mb": 1_024}
        body: dict[str, Any] = {"task_id": self._task_id, "spec": spec}
        if chance.random() < 0.6:
            body["queue_seconds"] = chance.randrange(5, 120)
        if chance.random() < 0.15:
            body["startup_script"] = "echo ready"
        if chance.random() < 0.2:
            body["agent"] = {"command": ["/bin/daemon"], "drain_command": ["/bin/drain"]}
        if chance.random() < 0.1:
            body["healthcheck"] = {"exec": ["/bin/true"]}
        if self._crowd.snapshots and chance.random() < 0.05:
            body["seed_snapshot_id"] = chance.choice(self._crowd.snapshots)
        return body

    async def _is_there(self) -> bool:
        answer = await self._try("GET", self._path)
        return answer is not None and answer.status == 200

    # -- use ------------------------------------------------------------------------------------------------------

    async def _use(self) -> None:
        chance, path = self._chance, self._path
        key = self._crowd.new_key() if chance.random() < 0.3 else ""
        what = chance.choice(
            (
                "get",
                "list",
                "exec",
                "exec",
                "snapshot",
                "snapshot",
                "restore",
                "restore",
                "restore",
                "rotate",
                "drain",
                "free",
            )
        )
        if what == "get":
            await self._try("GET", path)
        elif what == "list":
            await self._try("GET", "/v1/environments", query={"limit": "5"})
        elif what == "exec":
            await self._try("POST", path, key=key, query={"action": "exec"}, body={"cmd": ["true"]})
        elif what == "snapshot":
            await self._snapshot(key)
        elif what == "restore" and self._snapshots:
            await self._restore(chance.choice(self._snapshots), key)
        elif what == "rotate":
            await self._try("POST", path, key=key, query={"action": "rotate-token"})
        elif what == "drain" and chance.random() < 0.3:
            await self._try("POST", path, key=key, query={"action": "drain"})
        elif what == "free" and self._snapshots:
            await self._try("DELETE", f"/v1/snapshots/{self._snapshots.pop(0)}")

    async def _snapshot(self, key: str) -> None:
        body: dict[str, Any] = {"comment": key}
        if self._chance.random() < 0.3:
            body["retention_seconds"] = self._chance.randrange(30, 300)
        wait = self._chance.random() < 0.5
        answer = await self._try("POST", f"{self._path}/snapshots", key=key, wait=wait, body=body)
        if answer is not None and answer.status in (201, 202):
            self._snapshots.append(answer.body["id"])
            if self._chance.random() < 0.5:
                await self._restore(answer.body["id"], key="")
            self._crowd.snapshots.append(answer.body["id"])

    async def _restore(self, snapshot: str, key: str) -> None:
        await self._try("POST", f"/v1/snapshots/{snapshot}", key=key, query={"action": "restore"})

    async def _delete(self) -> None:
        for _ in range(ATTEMPTS):
            answer = await self._try("DELETE", self._path, wait=self._chance.random() < 0.7)
            if answer is not None and (answer.status in (202, 204) or answer.status in _OVER):
                return
            await asyncio.sleep(self._chance.uniform(0.5, 10.0))

    async def _try(self, method: str, path: str, *, key: str = "", **options: Any) -> Answer | None:
        """Ask; under a key, again while it is not clear what became of it."""
        for _ in range(ATTEMPTS if key else 1):
            with contextlib.suppress(Gone):
                answer = await self._crowd.ask(method, path, key=key, **options)
                if answer.status < 500:
                    return answer
            await asyncio.sleep(self._chance.uniform(0.1, 3.0))
        return None
