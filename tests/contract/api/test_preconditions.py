"""ETag, If-Match and If-None-Match: nobody changes what he has not seen."""

import asyncio

import httpx
import pytest
from control_harness import Running, running, until

from fusevm.control.etag import etag_of, matches, names_revision

ENV = "/v1/environments/fuse-t1"


def _reason(answer: httpx.Response) -> str:
    return answer.json()["error"]["details"]["reason"]


async def test_every_answer_with_one_environment_has_its_etag() -> None:
    async with running() as server:
        made = await server.http.post("/v1/environments", json={"task_id": "t1"})
        read = await server.http.get(ENV)
        assert made.headers["etag"] == read.headers["etag"]
        assert (await server.http.head(ENV)).headers["etag"] == read.headers["etag"]
        drained = await server.act("t1", "drain")
        assert drained.headers["etag"] not in ("", read.headers["etag"])
        assert "etag" not in (await server.http.get("/v1/environments")).headers
        assert "etag" not in (await server.http.get(ENV + "x")).headers


async def test_a_get_that_knows_the_etag_is_answered_without_a_body() -> None:
    async with running() as server:
        await server.create()
        etag = (await server.http.get(ENV)).headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            answer = await server.http.get(ENV, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
        assert (await server.http.get(ENV, headers={"If-None-Match": '"other"'})).status_code == 200
        await server.act("t1", "drain")
        assert (await server.http.get(ENV, headers={"If-None-Match": etag})).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("DELETE", ENV), ("POST", f"{ENV}?action=drain")])
async def test_a_change_of_what_has_changed_meanwhile_is_refused(method: str, path: str) -> None:
    async with running() as server:
        await server.create()
        answer = await server.http.request(method, path, headers={"If-Match": '"old"'})
        assert (answer.status_code, _reason(answer)) == (412, "precondition_failed")
        etag = (await server.http.get(ENV)).headers["etag"]
        assert answer.json()["error"]["details"]["etag"] == etag
        assert (await server.http.get(ENV)).json()["state"] == "running"
        assert (await server.http.request(method, path, headers={"If-Match": etag})).status_code < 300


async def test_every_versioned_change_of_an_environment_host_or_snapshot_takes_if_match() -> None:
    async with running() as server:
        await server.create()
        made = await server.http.post(ENV + "/snapshots", json={})
        snapshot = f"/v1/snapshots/{made.json()['id']}"
        for method, path in (
            ("POST", f"{ENV}?action=rotate-token"),
            ("POST", "/v1/hosts/h1?action=cordon"),
            ("POST", "/v1/hosts/h1?action=uncordon"),
            ("POST", "/v1/hosts/h1?action=drain"),
            ("DELETE", "/v1/hosts/h1"),
            ("POST", f"{snapshot}?action=restore"),
            ("DELETE", snapshot),
        ):
            answer = await server.http.request(method, path, headers={"If-Match": '"old"'})
            assert (answer.status_code, _reason(answer)) == (412, "precondition_failed"), path
        for path, method, change in (
            (snapshot, "DELETE", snapshot),
            ("/v1/hosts/h1", "POST", "/v1/hosts/h1?action=cordon"),
        ):

            async def is_changed(path: str = path, method: str = method, change: str = change) -> bool:
                etag = (await server.http.get(path)).headers["etag"]
                return (await server.http.request(method, change, headers={"If-Match": etag})).status_code == 204

            await until(is_changed)  # heartbeats change hosts, too


async def test_of_two_changes_that_saw_the_same_one_is_made() -> None:
    async with running() as server:
        await server.create()
        etag = (await server.http.get(ENV)).headers["etag"]
        answers = await asyncio.gather(*(_drain(server, etag) for _ in range(5)))
        assert sorted({answer.status_code for answer in answers}) == [200, 412]
        assert [answer.status_code for answer in answers].count(200) == 1


async def _drain(server: Running, etag: str) -> httpx.Response:
    return await server.act("t1", "drain", None, **{"If-Match": etag})


async def test_any_revision_will_do_for_a_star() -> None:
    async with running() as server:
        await server.create()
        assert (await server.http.delete(ENV, headers={"If-Match": "*"})).status_code == 204


@pytest.mark.parametrize(
    ("header", "is_match"),
    [
        ('"u.1"', True),
        ('W/"u.1"', True),
        ('"a", "u.1"', True),
        ("*", True),
        (" * ", True),
        ('"u.10"', False),
        ("u.1", False),
        ("", False),
        ('"a","b"', False),
    ],
)
def test_a_list_of_etags_is_read(header: str, is_match: bool) -> None:
    assert matches(header, etag_of("u", 1)) is is_match


@pytest.mark.parametrize(
    ("header", "is_named"),
    [
        ('"h.1.5"', True),
        ('"h.1.5+00ff"', True),
        ('W/"h.1.5+00ff"', True),
        ('"a", "h.1.5+00ff"', True),
        (" * ", True),
        ('"h.1.50"', False),
        ('"h.1.4+00ff"', False),
        ('"h.1"', False),
        ("h.1.5", False),
        ("", False),
    ],
)
def test_a_revision_is_named_whatever_was_shown_with_it(header: str, is_named: bool) -> None:
    assert names_revision(header, "h.1", 5) is is_named


def test_two_bodies_of_one_revision_have_two_etags() -> None:
    assert len({etag_of("h.1", 5), etag_of("h.1", 5, b"a"), etag_of("h.1", 5, b"b")}) == 3
