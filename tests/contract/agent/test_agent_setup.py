"""Setup, keyed processes, daemon, health check and state: docs/guest-protocol.md, section 6."""

import asyncio
import hashlib

import msgspec
import pytest
from agent_client import AgentClient, file

from fusevm.model.errors import BadPath, BadRequest, CommandNotFound, Error, ProcessNotFound, RouteNotFound
from fusevm.model.setup import AgentState, Healthcheck, HttpCheck, Restart, SetupFile, Verdict
from fusevm.wire.guest import (
    PROTOCOL_MAJOR,
    AgentHealth,
    AgentOrder,
    ExecRequest,
    GuestState,
    Process,
    ProcessList,
    SetupBody,
)

#: Says its number, is up, and stays.
STAYS = ["sh", "-c", "echo $$ >&2; echo up; exec sleep 100000"]


async def put_setup(agent: AgentClient, body: SetupBody) -> GuestState:
    return await agent.ask("PUT", "/setup", GuestState, body)


async def put_agent(agent: AgentClient, order: AgentOrder) -> GuestState:
    return await agent.ask("PUT", "/agent", GuestState, order)


async def await_daemon(agent: AgentClient, state: AgentState, order: str = "") -> GuestState:
    """Wait for a state of the daemon (of an order)."""
    return await agent.await_state(
        lambda seen: seen.agent is not None and seen.agent.state is state and order in ("", seen.agent_id)
    )


async def await_verdict(agent: AgentClient, verdict: Verdict) -> GuestState:
    return await agent.await_state(lambda seen: seen.health is not None and seen.health.state is verdict)


async def start_process(agent: AgentClient, request: ExecRequest) -> tuple[int, Process]:
    status, body = await agent.call("POST", "/processes", request)
    return status, msgspec.json.decode(body, type=Process)


async def test_the_protocol_is_one_that_knows_these_routes(agent):
    health = await agent.ask("GET", "/health", AgentHealth)
    major, minor = map(int, health.protocol.split("."))
    assert (major, minor >= 1) == (PROTOCOL_MAJOR, True)


async def test_a_fresh_machine_has_nothing(any_agent):
    state = await any_agent.state()
    assert (state.setup_id, state.agent_id, state.agent, state.health) == ("", "", None, None)
    assert state.version > 0


# -- setup -----------------------------------------------------------------------------------------------------------


async def test_a_setup_writes_files_and_reaches_commands(machine, agent):
    path, work = machine.path("a/config"), machine.path("work")
    body = SetupBody(
        id="u/1",
        fuse={"auth-token": file("t0ken"), "tls/key": file("key")},
        files={path: file("text", "0644")},
        env={"COLOUR": "blue", "SIZE": "big"},
        workdir=work,
    )
    state = await put_setup(agent, body)
    assert state.setup_id == "u/1"
    assert machine.read(f"{machine.folder}/auth-token") == b"t0ken"
    assert machine.read(f"{machine.folder}/tls/key") == b"key"
    assert machine.read(path) == b"text"
    assert await agent.run("printenv", "COLOUR") == (0, "blue\n")
    assert await agent.run("printenv", "SIZE", env={"SIZE": "small"}) == (0, "small\n")
    assert await agent.run("pwd") == (0, f"{work}\n")


async def test_the_same_setup_changes_nothing_and_another_replaces_it(machine, agent):
    first = SetupBody(id="1", fuse={"gone": file("1"), "stays": file("1")}, env={"A": "1"})
    state = await put_setup(agent, first)
    again = await put_setup(agent, SetupBody(id="1", fuse={"gone": file("other")}))
    assert again == state
    assert machine.read(f"{machine.folder}/gone") == b"1"
    state = await put_setup(agent, SetupBody(id="2", fuse={"stays": file("2")}, env={"B": "2"}))
    assert state.setup_id == "2"
    assert state.version != again.version
    assert machine.read(f"{machine.folder}/gone") is None
    assert machine.read(f"{machine.folder}/stays") == b"2"
    assert (await agent.run("printenv", "A"))[0] == 1
    assert await agent.run("printenv", "B") == (0, "2\n")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (SetupBody(id=""), BadRequest),
        (SetupBody(id="a\nb"), BadRequest),
        (SetupBody(id="x", fuse={"../x": file("")}), BadPath),
        (SetupBody(id="x", fuse={"/x": file("")}), BadPath),
        (SetupBody(id="x", fuse={"agent": file("")}), BadPath),
        (SetupBody(id="x", files={"relative": file("")}), BadPath),
        (SetupBody(id="x", files={"/proc/x": file("")}), BadPath),
        (SetupBody(id="x", files={"/dev/null": file("")}), BadPath),
        (SetupBody(id="x", fuse={"x": SetupFile(content_b64="%")}), BadRequest),
    ],
    ids=lambda value: repr(value)[:60],
)
async def test_what_a_setup_may_not_say_is_refused_and_leaves_nothing(machine, agent, body, error):
    body = msgspec.structs.replace(body, fuse={"good": file("x"), **body.fuse})
    with pytest.raises(error):
        await put_setup(agent, body)
    assert (await agent.state()).setup_id == ""
    assert machine.read(f"{machine.folder}/good") is None


async def test_files_cannot_reach_the_folder_of_secrets(machine, agent):
    with pytest.raises(BadPath):
        await put_setup(agent, SetupBody(id="x", files={f"{machine.folder}/x": file("")}))


# -- processes with a key --------------------------------------------------------------------------------------------


async def test_a_key_starts_one_process_and_keeps_its_output(agent):
    request = ExecRequest(cmd=["sh", "-c", "echo once; exit 3"], key="startup")
    status, first = await start_process(agent, request)
    assert (status, first.key) == (201, "startup")
    _, output = await agent.call("GET", "/processes/@startup/output?stream=stdout&offset=0&follow=true")
    assert output == b"once\n"
    status, again = await start_process(agent, request)
    assert (status, again.pid, again.state) == (200, first.pid, "exited")
    assert again.exit is not None
    assert again.exit.exit_code == 3
    assert (await agent.call("GET", f"/processes/{first.pid}/output?offset=2"))[1] == b"ce\n"
    assert len((await agent.ask("GET", "/processes", ProcessList)).processes) == 1


async def test_a_process_that_could_not_be_started_leaves_its_key_free(agent):
    with pytest.raises(CommandNotFound):
        await start_process(agent, ExecRequest(cmd=["no-such-program"], key="k"))
    with pytest.raises(ProcessNotFound):
        await agent.call("GET", "/processes/@k")
    assert (await start_process(agent, ExecRequest(cmd=["true"], key="k")))[0] == 201


async def test_processes_without_a_key_are_as_many_as_are_asked_for(agent):
    pids = {(await start_process(agent, ExecRequest(cmd=["sleep", "100000"])))[1].pid for _ in range(2)}
    assert len(pids) == 2


# -- the daemon ------------------------------------------------------------------------------------------------------


async def test_a_daemon_runs_and_is_started_again_when_it_is_killed(machine, agent):
    state = await put_agent(agent, AgentOrder(id="1", command=STAYS))
    assert state.agent_id == "1"
    state = await await_daemon(agent, AgentState.RUNNING)
    assert (state.agent.restarts, state.agent.exit_code) == (0, None)
    assert state.agent.since_ms > 1_000_000_000_000
    await agent.await_daemon_output("up")
    await machine.kill_daemon(agent)
    state = await agent.await_state(lambda seen: seen.agent.state is AgentState.RUNNING and seen.agent.restarts == 1)
    assert state.agent.exit_code == 137
    assert state.agent.message


async def test_the_same_order_changes_nothing_and_another_one_replaces_the_daemon(agent):
    await put_agent(agent, AgentOrder(id="1", command=["sh", "-c", "echo one; exec sleep 100000"]))
    state = await await_daemon(agent, AgentState.RUNNING)
    assert await put_agent(agent, AgentOrder(id="1", command=["other"])) == state
    await put_agent(agent, AgentOrder(id="2", command=["sh", "-c", "echo two; exec sleep 100000"]))
    state = await await_daemon(agent, AgentState.RUNNING, "2")
    await agent.await_daemon_output("two")
    assert (state.agent.restarts, await agent.daemon_output()) == (0, "one\ntwo\n")


@pytest.mark.parametrize(("policy", "code"), [(Restart.NEVER, 3), (Restart.ON_FAILURE, 0)])
async def test_a_daemon_that_is_not_to_be_started_again_is_exited(agent, policy, code):
    await put_agent(agent, AgentOrder(id="1", command=["sh", "-c", f"echo bye; exit {code}"], restart=policy))
    state = await await_daemon(agent, AgentState.EXITED)
    assert (state.agent.exit_code, state.agent.restarts) == (code, 0)
    # Who follows is not left waiting.
    assert (await agent.call("GET", "/agent/output?follow=true"))[1] == b"bye\n"


async def test_a_failing_daemon_is_started_again_and_says_why(agent):
    await put_agent(agent, AgentOrder(id="1", command=["sh", "-c", "exit 4"], restart=Restart.ON_FAILURE))
    state = await agent.await_state(lambda seen: seen.agent is not None and seen.agent.restarts >= 1)
    assert state.agent.exit_code == 4
    assert "exit code 4" in state.agent.message


async def test_a_program_that_does_not_exist_fails(agent):
    await put_agent(agent, AgentOrder(id="1", command=["no-such-program"]))
    state = await await_daemon(agent, AgentState.FAILED)
    assert "no-such-program" in state.agent.message


async def test_a_downloaded_daemon_is_checked_and_started(machine, agent):
    program = b"#!/bin/sh\necho downloaded\nexec sleep 100000\n"
    digest = hashlib.sha256(program).hexdigest()
    url = machine.publish(program)
    await put_agent(agent, AgentOrder(id="1", download_url=url, sha256=digest))
    await await_daemon(agent, AgentState.RUNNING, "1")
    await agent.await_daemon_output("downloaded")
    await put_agent(agent, AgentOrder(id="2", download_url=url, sha256="0" * 64))
    state = await await_daemon(agent, AgentState.FAILED, "2")
    assert digest in state.agent.message
    await put_agent(agent, AgentOrder(id="3", download_url=f"{url}/nowhere"))
    state = await await_daemon(agent, AgentState.FAILED, "3")
    assert "404" in state.agent.message


async def test_the_daemon_gets_its_credentials(machine, agent):
    fuse = {"auth-token": file("t0ken\n"), "gateway.json": file('{"url": "https://g", "token": "gt"}')}
    fuse |= {"secrets.json": file("{}"), "manifest.json": file("{}")}
    await put_setup(agent, SetupBody(id="1", fuse=fuse, env={"SHARED": "yes"}))
    names = {
        "FUSE_AUTH_TOKEN": "t0ken",
        "FUSE_AUTH_TOKEN_FILE": f"{machine.folder}/auth-token",
        "FUSE_GATEWAY_URL": "https://g",
        "FUSE_GATEWAY_TOKEN": "mine",
        "FUSE_SECRETS_FILE": f"{machine.folder}/secrets.json",
        "FUSE_MANIFEST_FILE": f"{machine.folder}/manifest.json",
        "SHARED": "yes",
    }
    script = ";".join(f"printenv {name}" for name in names)
    order = AgentOrder(id="1", command=["sh", "-c", script], env={"FUSE_GATEWAY_TOKEN": "mine"}, restart=Restart.NEVER)
    await put_agent(agent, order)
    await await_daemon(agent, AgentState.EXITED)
    assert (await agent.daemon_output()).splitlines() == list(names.values())


@pytest.mark.parametrize(
    "order",
    [
        AgentOrder(id="", command=["true"]),
        AgentOrder(id="1"),
    ],
)
async def test_orders_that_make_no_sense_are_refused(any_agent, order):
    with pytest.raises(BadRequest):
        await put_agent(any_agent, order)
    assert (await any_agent.state()).agent is None


# -- drain -----------------------------------------------------------------------------------------------------------


async def test_a_drain_runs_the_command_and_ends_the_daemon_for_good(agent):
    await put_agent(agent, AgentOrder(id="1", command=STAYS, drain_command=["sh", "-c", "echo draining"]))
    await agent.await_daemon_output("up")
    answer = await agent.drain()
    assert (answer.exit_code, answer.message) == (143, "")
    assert await agent.daemon_output() == "up\ndraining\n"
    state = await agent.state()
    assert (state.agent.state, state.agent.exit_code, state.agent.restarts) == (AgentState.DRAINED, 143, 0)
    assert await agent.drain(1) == answer
    # Who follows is not left waiting, and the same order does not wake it up.
    assert (await agent.call("GET", "/agent/output?offset=3&follow=true"))[1] == b"draining\n"
    assert (await put_agent(agent, AgentOrder(id="1", command=STAYS))).agent.state is AgentState.DRAINED
    await put_agent(agent, AgentOrder(id="2", command=STAYS))
    await await_daemon(agent, AgentState.RUNNING, "2")


async def test_a_failing_drain_command_is_told_and_the_daemon_ends_all_the_same(agent):
    await put_agent(agent, AgentOrder(id="1", command=STAYS, drain_command=["sh", "-c", "exit 9"]))
    await agent.await_daemon_output("up")
    answer = await agent.drain()
    assert answer.exit_code == 143
    assert "exit code 9" in answer.message
    assert (await agent.state()).agent.state is AgentState.DRAINED


async def test_nothing_to_drain_is_no_error(any_agent):
    answer = await any_agent.drain()
    assert (answer.exit_code, answer.message) == (None, "")
    with pytest.raises(BadRequest):
        await any_agent.drain(0)


async def test_orders_are_known_by_their_id(any_agent):
    stays = ["sleep", "100000"]
    first = await put_setup(any_agent, SetupBody(id="1"))
    assert first.setup_id == "1"
    assert await put_setup(any_agent, SetupBody(id="1", env={"A": "1"})) == first
    second = await put_setup(any_agent, SetupBody(id="2"))
    assert (second.setup_id, second.version != first.version) == ("2", True)
    await put_agent(any_agent, AgentOrder(id="1", command=stays))
    state = await await_daemon(any_agent, AgentState.RUNNING, "1")
    assert await put_agent(any_agent, AgentOrder(id="1", command=["other"])) == state
    await put_agent(any_agent, AgentOrder(id="2", command=stays))
    state = await await_daemon(any_agent, AgentState.RUNNING, "2")
    assert (state.agent.restarts, state.agent.exit_code) == (0, None)
    answer = await any_agent.drain()
    assert (await any_agent.state()).agent.state is AgentState.DRAINED
    assert await any_agent.drain() == answer
    state = await put_agent(any_agent, AgentOrder(id="2", command=stays))
    assert state.agent.state is AgentState.DRAINED
    await put_agent(any_agent, AgentOrder(id="3", command=stays))
    await await_daemon(any_agent, AgentState.RUNNING, "3")


async def test_a_keyed_process_is_found_again_with_its_output(any_agent):
    request = ExecRequest(cmd=["echo", "once"], key="startup")
    status, first = await start_process(any_agent, request)
    _, output = await any_agent.call("GET", "/processes/@startup/output?stream=stdout&offset=0&follow=true")
    assert b"once" in output
    status_again, again = await start_process(any_agent, request)
    assert (status, status_again, first.key, again.pid, again.state) == (201, 200, "startup", first.pid, "exited")
    assert (again.exit.exit_code, again.output.stdout.end) == (0, len(output))
    assert (await any_agent.call("GET", "/processes/@startup/output?offset=3"))[1] == output[3:]
    with pytest.raises(BadRequest):
        await any_agent.call("GET", "/processes/@startup/output?stream=nope")
    with pytest.raises(ProcessNotFound):
        await any_agent.call("GET", "/processes/@other")


# -- the health check ------------------------------------------------------------------------------------------------


async def test_verdicts_of_commands(agent):
    check = Healthcheck(exec=("true",), interval_seconds=1, timeout_seconds=1, retries=1)
    await agent.call("PUT", "/healthcheck", check)
    state = await await_verdict(agent, Verdict.PASSING)
    assert (state.health.failures, state.health.message) == (0, "")
    await agent.call("PUT", "/healthcheck", msgspec.structs.replace(check, exec=("sh", "-c", "exit 6")))
    state = await await_verdict(agent, Verdict.FAILING)
    assert state.health.failures >= 1
    assert "exit code 6" in state.health.message
    assert state.health.since_ms > 1_000_000_000_000


async def test_failures_in_the_start_period_do_not_count(agent):
    check = Healthcheck(exec=("false",), interval_seconds=1, timeout_seconds=1, retries=1, start_period_seconds=3600)
    state = await agent.ask("PUT", "/healthcheck", GuestState, check)
    async with asyncio.timeout(60):
        while not state.health.message:
            await asyncio.sleep(0.05)
            state = await agent.state()
    assert (state.health.state, state.health.failures) == (Verdict.STARTING, 0)


@pytest.mark.parametrize("how", ["empty", "delete"])
async def test_a_health_check_can_be_removed(any_agent, how):
    await any_agent.call("PUT", "/healthcheck", Healthcheck(exec=("true",)))
    await await_verdict(any_agent, Verdict.PASSING)
    method, body = ("PUT", {}) if how == "empty" else ("DELETE", None)
    assert (await any_agent.ask(method, "/healthcheck", GuestState, body)).health is None
    assert (await any_agent.state()).health is None


@pytest.mark.parametrize(
    "check",
    [
        Healthcheck(http=HttpCheck(port=0)),
        Healthcheck(http=HttpCheck(port=80), exec=("true",)),
        Healthcheck(exec=("true",), interval_seconds=1, timeout_seconds=2),
    ],
)
async def test_health_checks_that_make_no_sense_are_refused(agent, check):
    with pytest.raises(BadRequest):
        await agent.call("PUT", "/healthcheck", check)


# -- state -----------------------------------------------------------------------------------------------------------


async def test_who_waits_for_news_gets_them(agent):
    state = await agent.state()
    assert (await agent.ask("GET", f"/state?after={state.version}&wait_ms=1", GuestState)) == state
    assert (await agent.ask("GET", "/state?after=0&wait_ms=60000", GuestState)) == state
    waiting = asyncio.create_task(agent.ask("GET", f"/state?after={state.version}&wait_ms=60000", GuestState))
    await put_setup(agent, SetupBody(id="news"))
    assert (await waiting).setup_id == "news"
    with pytest.raises(BadRequest):
        await agent.call("GET", "/state?after=1&wait_ms=60001")


async def test_routes_that_do_not_exist_are_told_apart(agent):
    with pytest.raises(RouteNotFound):
        await agent.call("GET", "/setups")
    with pytest.raises(Error):
        await agent.call("GET", "/agent/output?stream=nope")
