"""Who the console lets in, request by request, without a server."""

from collections.abc import Iterable

import pytest
from starlette.types import Message, Receive, Scope, Send

from fusevm.console.gate import Gate

KEY, PORT = "the-key", 4000
COOKIE = {"Cookie": f"fuse-console-{PORT}={KEY}"}


class Inside:
    """What the gate protects: remembers what came through."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


async def knock(
    path: str = "/", query: str = "", *, host: str = "localhost:4000", kind: str = "http", **headers: str
) -> tuple[list[Message], list[Scope]]:
    """Send one request; what was answered, and what came through."""
    inside, answers = Inside(), []
    pairs: Iterable[tuple[str, str]] = {"Host": host, **headers}.items()
    scope = {
        "type": kind,
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().replace("_", "-").encode(), value.encode()) for name, value in pairs],
    }

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        answers.append(message)

    await Gate(inside, KEY, PORT)(scope, receive, send)
    return answers, inside.scopes


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:4000", "LOCALHOST:9", "127.0.0.1:4000", "127.9.9.9", "[::1]:4000"]
)
async def test_local_names_come_in_with_the_cookie(host: str) -> None:
    answers, came = await knock(host=host, **COOKIE)
    assert answers[0]["status"] == 200
    assert len(came) == 1


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "localhost.evil.example:4000", "10.0.0.1:4000", "127.0.0.1.evil.example", "[", "[::2]:1"],
)
async def test_other_names_stay_out(host: str) -> None:
    answers, came = await knock(host=host, **COOKIE)
    assert answers[0]["status"] == 403
    assert came == []


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "origin", ["http://localhost:4001", "null", "", "http://evil.example", "http://[", "localhost:4000"]
)
async def test_other_origins_stay_out(kind: str, origin: str) -> None:
    answers, came = await knock(kind=kind, Origin=origin, **COOKIE)
    assert answers[0].get("status") == 403 or answers[0] == {
        "type": "websocket.close",
        "code": 1008,
        "reason": "refused",
    }
    assert came == []


async def test_the_own_origin_comes_in() -> None:
    _, came = await knock(kind="websocket", Origin="http://localhost:4000", **COOKIE)
    assert len(came) == 1


@pytest.mark.parametrize("cookie", ["", f"fuse-console-4001={KEY}", "fuse-console-4000=guess", "fuse-console-4000"])
async def test_without_the_key_nobody_comes_in(cookie: str) -> None:
    answers, came = await knock(Cookie=cookie)
    assert answers[0]["status"] == 403
    assert came == []


async def test_cookies_of_other_programs_on_this_machine_do_not_matter() -> None:
    _, came = await knock(Cookie=f'odd="{{,;=; {COOKIE["Cookie"]}; a b=c')
    assert len(came) == 1


@pytest.mark.parametrize(
    ("path", "query", "target"),
    [
        ("/", f"key={KEY}", b"/"),
        ("/environments/fuse-a", f"uid=1&key={KEY}&x=", b"/environments/fuse-a?uid=1&x="),
        ("//evil.example/", f"key={KEY}", b"/evil.example/"),
        ("/\\evil.example", f"key={KEY}", b"/evil.example"),
    ],
)
async def test_the_key_in_the_address_becomes_a_cookie(path: str, query: str, target: bytes) -> None:
    answers, came = await knock(path, query)
    headers = dict(answers[0]["headers"])
    assert (answers[0]["status"], headers[b"location"]) == (303, target)
    assert headers[b"set-cookie"] == f"fuse-console-4000={KEY}; HttpOnly; Path=/; SameSite=lax".encode()
    assert came == []


async def test_what_a_reverse_proxy_would_say_is_dropped() -> None:
    _, came = await knock(X_Forwarded_Prefix="/elsewhere", **COOKIE)
    assert [name for name, _ in came[0]["headers"]] == [b"host", b"cookie"]


async def test_answers_allow_only_what_comes_from_the_console() -> None:
    answers, _ = await knock(**COOKIE)
    policy = dict(answers[0]["headers"])[b"content-security-policy"]
    assert b"default-src 'self'" in policy
    assert b"frame-ancestors 'none'" in policy
    assert b"http" not in policy
