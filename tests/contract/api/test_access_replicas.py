"""Access on several replicas over one PostgreSQL, and without an encryption key."""

import contextlib
from collections.abc import AsyncIterator

import pytest
from control_harness import Running, running

from fusevm.testing.fake_host import FakeHost

TOKEN = "master-token"
MASTER = {"Authorization": f"Bearer {TOKEN}"}
KEY, NEXT_KEY = "ab" * 32, "cd" * 32


@contextlib.asynccontextmanager
async def _replicas(database: str, **second: str | tuple[str, ...]) -> AsyncIterator[tuple[Running, Running]]:
    host = FakeHost("h1")
    common = {"database": database, "auth_token": TOKEN, "encryption_key": KEY}
    async with running(host, **common) as one, running(host, **{**common, **second}) as other:
        yield one, other


async def test_a_key_of_one_replica_is_good_on_the_other_and_its_revocation_holds_at_once(postgres_url: str) -> None:
    async with _replicas(postgres_url) as (one, other):
        made = (await one.http.post("/v1/api-keys", json={"tenant": "acme"}, headers=MASTER)).json()
        headers = {"Authorization": f"Bearer {made['key']}"}
        for _ in range(3):
            assert (await other.http.get("/v1/environments", headers=headers)).status_code == 200
        assert (await one.http.delete(f"/v1/api-keys/{made['id']}", headers=MASTER)).status_code == 204
        assert (await other.http.get("/v1/environments", headers=headers)).status_code == 401


async def test_a_session_of_one_replica_is_good_on_the_other_also_while_keys_are_changed(postgres_url: str) -> None:
    async with _replicas(postgres_url, encryption_key=NEXT_KEY, previous_keys=(KEY,)) as (one, other):
        login = await one.http.post("/login", json={"token": TOKEN})
        cookie = {"Cookie": login.headers["set-cookie"].partition(";")[0]}
        assert (await other.http.get("/v1/environments", headers=cookie)).status_code == 200


async def test_the_same_key_creates_once_on_two_replicas(postgres_url: str) -> None:
    async with _replicas(postgres_url) as (one, other):
        headers = MASTER | {"Idempotency-Key": "k"}
        first = await one.http.post("/v1/environments", json={"task_id": "t"}, headers=headers)
        again = await other.http.post("/v1/environments", json={"task_id": "t"}, headers=headers)
        assert (first.status_code, again.status_code) == (201, 201)
        assert first.json()["uid"] == again.json()["uid"]
        assert again.headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize(
    ("path", "body", "more"),
    [
        ("/v1/environments", {"task_id": "t", "secrets": {"A": "b"}}, {}),
        ("/v1/environments", {"task_id": "t", "startup_script": "true"}, {}),
        ("/login", {"token": TOKEN}, {}),
        ("/v1/api-keys", {}, {"Idempotency-Key": "k"}),
    ],
    ids=["secrets", "script", "login", "kept key"],
)
async def test_without_an_encryption_key_secrets_are_refused_in_a_sentence(
    path: str, body: dict[str, object], more: dict[str, str], postgres_url: str
) -> None:
    async with running(database=postgres_url, auth_token=TOKEN, headers=MASTER) as server:
        answer = await server.http.post(path, json=body, headers=more)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (501, "unimplemented")
        assert error["details"]["reason"] == "no_encryption_key"
        assert "TOKEN_ENCRYPTION_KEY" in error["message"]
        assert (await server.http.get("/v1/environments")).json()["environments"] == []
        assert (await server.http.get("/v1/api-keys")).json()["api_keys"] == []
        assert (await server.http.post("/v1/environments", json={"task_id": "plain"})).status_code == 201
