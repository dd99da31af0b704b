"""From where the daemon is fetched: what a request names, else its profile, else the setting; never half of one with
half of another."""

from typing import Any

import pytest
from control_harness import running

from fusevm.model.setup import AgentSpec

OURS, THEIRS, PROFILES = "1" * 64, "2" * 64, "3" * 64
DEFAULT_URL, OTHER_URL, PROFILE_URL = "https://default/agent", "https://other/agent", "https://profile/agent"
SETTINGS: dict[str, Any] = {
    "agent_download_url": DEFAULT_URL,
    "agent_download_sha256": OURS,
    "agents": {"helper": AgentSpec(download_url=PROFILE_URL, sha256=PROFILES)},
}


@pytest.mark.parametrize(
    ("agent", "url", "sha256"),
    [
        ({"restart": "never"}, DEFAULT_URL, OURS),
        ({"command": ["/fuse/agent", "--flag"]}, DEFAULT_URL, OURS),
        ({"sha256": THEIRS}, DEFAULT_URL, THEIRS),
        ({"command": ["/fuse/agent"], "sha256": THEIRS}, DEFAULT_URL, THEIRS),
        ({"command": ["/usr/bin/own"]}, "", ""),
        ({"download_url": OTHER_URL}, OTHER_URL, ""),
        ({"download_url": OTHER_URL, "sha256": THEIRS}, OTHER_URL, THEIRS),
        ("helper", PROFILE_URL, PROFILES),
        ({"profile": "helper", "download_url": OTHER_URL}, OTHER_URL, ""),
        ({"profile": "helper", "sha256": THEIRS}, PROFILE_URL, THEIRS),
    ],
)
async def test_url_and_digest_belong_together(agent: Any, url: str, sha256: str) -> None:
    async with running(**SETTINGS) as server:
        await server.create(agent=agent)
        (guest,) = server.host.guests.values()
        assert guest.order is not None
        assert (guest.order.download_url, guest.order.sha256) == (url, sha256)


async def test_a_digest_of_nothing_is_refused() -> None:
    async with running(**SETTINGS) as server:
        body = {"task_id": "t1", "agent": {"command": ["/usr/bin/own"], "sha256": THEIRS}}
        answer = await server.http.post("/v1/environments", json=body)
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "agent.sha256")


async def test_the_requests_gateway_token_goes_to_the_daemons_gateway_only_if_it_is_meant_for_it() -> None:
    async with running() as server:
        daemon = {"command": ["/opt/run"], "gateway": "https://own"}
        await server.create(agent=daemon, gateway_token="gate-token")
        (guest,) = server.host.guests.values()
        assert guest.order is not None
        assert guest.order.env["FUSE_GATEWAY_URL"] == "https://own"
        assert guest.order.env["FUSE_GATEWAY_TOKEN"] == "gate-token"
        body = {"task_id": "t2", "agent": daemon, "gateway_url": "https://other", "gateway_token": "gate-token"}
        answer = await server.http.post("/v1/environments", json=body)
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "gateway_token")
