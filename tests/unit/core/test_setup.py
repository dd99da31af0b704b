"""From what a request brings along to files, variables and duties."""

import base64
import subprocess
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from fusevm.core.policy import Policy
from fusevm.core.setup import (
    MAX_FILES_BYTES,
    Prepared,
    complete_healthcheck,
    prepare,
    render_env,
    secret_values,
    with_token,
)
from fusevm.model.errors import BadField, PayloadTooLarge, Unimplemented
from fusevm.model.setup import AGENT_PATH, AgentSpec, Duties, Healthcheck, HttpCheck, Setup, SetupFile

POLICY = Policy()
FRESH = "fresh-token"


def b64(content: bytes | str) -> str:
    return base64.b64encode(content.encode() if isinstance(content, str) else content).decode()


def file(content: bytes | str = "x", mode: str = "0644") -> SetupFile:
    return SetupFile(content_b64=b64(content), mode=mode)


def prepared(**asked: Any) -> Prepared:
    return prepare(POLICY, auth_token=FRESH, **asked)


def below_fuse(found: Prepared) -> dict[str, str]:
    """Content by name."""
    return {name: base64.b64decode(file.content_b64).decode() for name, file in found.setup.fuse.items()}


def refusal(**asked: Any) -> BadField:
    with pytest.raises(BadField) as caught:
        prepared(**asked)
    return caught.value


# -- layout --------------------------------------------------------------------------------------------------------


def test_nothing_brought_along_is_nothing_to_do():
    assert prepared() == Prepared(Setup(), Duties())
    assert prepared(startup_script_timeout_seconds=7) == Prepared(Setup(), Duties())


@pytest.mark.parametrize(
    "asked",
    [
        {"manifest_inline": b64('{"version":"1"}')},
        {"secrets": {"a": "b"}},
        {"startup_script": "true"},
        {"files": {"/etc/motd": file()}},
        {"gateway_url": "https://gateway"},
        {"gateway_token": "t"},
        {"healthcheck": Healthcheck(exec=("true",))},
        {"agent": AgentSpec(command=("daemon",))},
    ],
)
def test_whatever_is_brought_along_is_delivered_with_all_files_of_ours(asked: dict[str, Any]):
    found = prepared(**asked)
    assert found.duties.setup
    assert {"manifest.json", "secrets.json", "env", "auth-token"} <= set(found.setup.fuse)
    assert {file.mode for file in found.setup.fuse.values()} == {"0600"}


def test_what_is_in_the_files_of_ours():
    manifest = '{"version":"1","workspace":"/w","env":{"A":{"secret":"s"}}}'
    found = prepared(manifest_inline=b64(manifest), secrets={"s": "it's"}, gateway_url="https://gw", gateway_token="gt")
    files = below_fuse(found)
    assert files["manifest.json"] == manifest
    assert msgspec.json.decode(files["secrets.json"]) == {"s": "it's"}
    assert files["env"] == "A='it'\\''s'\n"
    assert files["auth-token"] == FRESH
    assert msgspec.json.decode(files["gateway.json"]) == {"url": "https://gw", "token": "gt"}
    assert (found.setup.env, found.setup.workspace) == ({"A": "it's"}, "/w")


def test_without_a_gateway_there_is_no_file_about_one():
    assert "gateway.json" not in prepared(secrets={"a": "b"}).setup.fuse


def test_files_keep_their_modes():
    files = {"/etc/motd": file("hi", "0600"), "/usr/local/bin/tool": file(b"\x00\xff", "755")}
    assert prepared(files=files).setup.files == files


def test_the_record_knows_what_there_is_to_do():
    duties = prepared(
        startup_script="true",
        startup_script_timeout_seconds=7,
        agent=AgentSpec(command=("daemon",), port=9000),
        healthcheck=Healthcheck(exec=("true",)),
    ).duties
    assert duties == Duties(setup=True, startup_timeout_s=7, agent=True, port=9000, healthcheck=True)
    assert prepared(secrets={"a": "b"}).duties == Duties(setup=True)


@pytest.mark.parametrize(
    "value", ["", "plain", "it's", "a b", "$HOME `id` \\", "two\nlines", '"quoted"', "ünïcode", "'"]
)
def test_a_shell_reads_the_variables_exactly_as_they_are(value: str):
    script = render_env({"A": "before", "VALUE": value, "Z": "after"}) + 'printf "%s" "$A|$VALUE|$Z"'
    heard = subprocess.run(["sh", "-c", script], capture_output=True, check=True, timeout=60)
    assert heard.stdout.decode() == f"before|{value}|after"


# -- the daemon ----------------------------------------------------------------------------------------------------

DAEMON = AgentSpec(command=("daemon", "--serve"), env={"A": "b"})


def agent(found: Prepared) -> AgentSpec:
    assert found.setup.agent is not None
    return found.setup.agent


def test_the_daemon_finds_everything_by_its_variables():
    found = prepared(agent=DAEMON, gateway_url="https://gw", gateway_token="gt", secrets={"a": "b"})
    assert agent(found).env == {
        "A": "b",
        "FUSE_AUTH_TOKEN": FRESH,
        "FUSE_AUTH_TOKEN_FILE": "/fuse/auth-token",
        "FUSE_SECRETS_FILE": "/fuse/secrets.json",
        "FUSE_MANIFEST_FILE": "/fuse/manifest.json",
        "FUSE_GATEWAY_URL": "https://gw",
        "FUSE_GATEWAY_TOKEN": "gt",
    }
    assert {"/fuse/" + name for name in found.setup.fuse} > {
        value for name, value in agent(found).env.items() if name.endswith("_FILE")
    }
    assert agent(found).command == ("daemon", "--serve")


def test_without_a_gateway_the_daemon_hears_of_none():
    assert not [name for name in agent(prepared(agent=DAEMON)).env if "GATEWAY" in name]


def test_a_token_of_its_own_is_kept():
    found = prepared(agent=replace(DAEMON, auth_token="mine"))
    assert (agent(found).auth_token, agent(found).env["FUSE_AUTH_TOKEN"]) == ("mine", "mine")
    assert below_fuse(found)["auth-token"] == "mine"


def test_a_gateway_of_its_own_goes_before_the_requests_one():
    own = replace(DAEMON, gateway="https://own")
    found = prepared(agent=replace(own, gateway_token="own"), gateway_url="https://gw", gateway_token="gt")
    assert (agent(found).gateway, agent(found).gateway_token) == ("https://own", "own")
    assert msgspec.json.decode(below_fuse(found)["gateway.json"]) == {"url": "https://own", "token": "own"}
    found = prepared(agent=replace(DAEMON, gateway_token="own"), gateway_url="https://gw", gateway_token="gt")
    assert (agent(found).gateway, agent(found).gateway_token) == ("https://gw", "own")


def test_a_gateway_token_is_never_dropped_and_never_goes_to_another_gateway():
    own = replace(DAEMON, gateway="https://own")
    for url in ("", "https://own"):
        found = prepared(agent=own, gateway_url=url, gateway_token="gt")
        assert (agent(found).gateway, agent(found).gateway_token) == ("https://own", "gt")
    refused = refusal(agent=own, gateway_url="https://gw", gateway_token="gt")
    assert refused.field == "gateway_token"
    assert "agent.gateway_token" in refused.problem


def test_what_is_downloaded_is_what_is_run():
    found = prepared(agent=AgentSpec(download_url="https://example.org/daemon", sha256="a" * 64))
    assert agent(found).command == (AGENT_PATH,)


def test_the_daemons_files_go_with_the_others_and_those_below_fuse_into_memory():
    files = {"/etc/daemon.toml": file("a"), "/fuse/daemon/key": file("b", "0400")}
    found = prepared(agent=replace(DAEMON, files=files), files={"/etc/motd": file("c")})
    assert found.setup.files == {"/etc/motd": file("c"), "/etc/daemon.toml": file("a")}
    assert found.setup.fuse["daemon/key"] == file("b", "0400")
    assert agent(found).files == {}


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        ({"command": ()}, "agent", "give a command, or a download_url"),
        ({"download_url": "ftp://x/y"}, "agent.download_url", "is no http or https URL"),
        ({"download_url": "https://"}, "agent.download_url", "is no http or https URL"),
        ({"download_url": "https://x:0/"}, "agent.download_url", "is no http or https URL"),
        ({"download_url": "https://x:99999/"}, "agent.download_url", "is no http or https URL"),
        ({"download_url": "https://[x/"}, "agent.download_url", "is no http or https URL"),
        ({"download_url": "https://x/a b"}, "agent.download_url", "is no http or https URL"),
        ({"download_url": "https://x/\n"}, "agent.download_url", "is no http or https URL"),
        ({"download_url": "https://x/" + "y" * 4096}, "agent.download_url", "is no http or https URL"),
        ({"download_url": "https://x", "sha256": "A" * 64}, "agent.sha256", "64 hex digits in lower case"),
        ({"download_url": "https://x", "sha256": "a" * 63}, "agent.sha256", "64 hex digits in lower case"),
        ({"sha256": "a" * 64}, "agent.sha256", "there is no download_url"),
        ({"command": ("", "x")}, "agent.command", "the program's name is empty"),
        ({"command": ("a\x00",)}, "agent.command", "a NUL character"),
        ({"command": ("x",) * 1025}, "agent.command", "1025 arguments are more than 1024"),
        ({"drain_command": ("",)}, "agent.drain_command", "the program's name is empty"),
        ({"auth_token": "a b"}, "agent.auth_token", "visible ASCII"),
        ({"auth_token": "x" * 4097}, "agent.auth_token", "visible ASCII"),
        ({"gateway_token": "a\nb"}, "agent.gateway_token", "visible ASCII"),
        ({"gateway": "https://x", "gateway_token": "a\nb"}, "agent.gateway_token", "visible ASCII"),
        ({"gateway": "a b"}, "agent.gateway", "is no address"),
        ({"gateway": "x" * 4097}, "agent.gateway", "is no address"),
        ({"gateway": "a\nb"}, "agent.gateway", "is no address"),
        ({"port": -1}, "agent.port", "-1 is not within 0 to 65535"),
        ({"port": 65_536}, "agent.port", "65536 is not within 0 to 65535"),
        ({"env": {"A B": "x"}}, "agent.env", "is no name of a variable"),
        ({"env": {"A": "a\x00"}}, "agent.env.A", "a NUL character"),
        ({"files": {"relative": file()}}, "agent.files", "is no clean absolute path"),
        ({"files": {"/fuse": file()}}, "agent.files", "is taken"),
        ({"files": {"/fuse/auth-token": file()}}, "agent.files", "is taken"),
        ({"files": {"/fuse/env/x": file()}}, "agent.files", "is taken"),
        ({"files": {AGENT_PATH: file()}}, "agent.files", "is taken"),
    ],
)
def test_a_daemon_that_cannot_work_is_refused_by_field(fields: dict[str, Any], field: str, sentence: str):
    found = refusal(agent=replace(DAEMON, **fields))
    assert (found.field, sentence in found.problem) == (field, True), found.problem


def test_a_file_of_both_the_request_and_the_daemon_is_refused():
    found = refusal(agent=replace(DAEMON, files={"/etc/x": file()}), files={"/etc/x": file()})
    assert (found.field, found.problem) == ("agent.files", "'/etc/x' is taken")


def test_a_request_gateway_is_checked_too():
    assert refusal(gateway_url="a b").field == "gateway_url"
    assert refusal(gateway_token="a b").field == "gateway_token"


# -- another token -------------------------------------------------------------------------------------------------


def test_another_token_is_put_everywhere_and_changes_nothing_else():
    before = prepared(agent=DAEMON, secrets={"a": "b"}, files={"/etc/x": file()})
    after = with_token(before.setup, "new")
    assert below_fuse(Prepared(after, before.duties)) == below_fuse(before) | {"auth-token": "new"}
    assert after.agent is not None
    assert (after.agent.auth_token, after.agent.env["FUSE_AUTH_TOKEN"]) == ("new", "new")
    assert after.former_tokens == (FRESH,)
    delivered = msgspec.json.encode(replace(after, former_tokens=())).decode()
    assert FRESH not in delivered
    assert b64(FRESH) not in delivered
    assert replace(with_token(after, FRESH), former_tokens=()) == before.setup


def test_the_last_replaced_tokens_are_kept_and_nobody_may_read_them():
    setup = prepared(agent=DAEMON).setup
    for number in range(20):
        setup = with_token(setup, f"token-{number}")
    assert setup.former_tokens == tuple(f"token-{number}" for number in range(3, 19))
    assert {"token-3", "token-18", "token-19"} <= secret_values(setup)


def test_a_setup_without_a_daemon_gets_the_file():
    assert with_token(Setup(), "new") == Setup(fuse={"auth-token": SetupFile(content_b64=b64("new"), mode="0600")})


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["", "x", "/", "//x", "/a/", "/a//b", "/a/./b", "/a/../b", "/a\nb", "/a\rb", "/a\x00b", "/" + "x" * 4096],
)
def test_a_path_that_is_not_clean_is_refused(path: str):
    assert "is no clean absolute path of a file" in refusal(files={path: file()}).problem


@pytest.mark.parametrize("path", ["/fuse", "/fuse/x", "/fuse/auth-token"])
def test_files_of_a_request_stay_out_of_fuse(path: str):
    assert "is below /fuse" in refusal(files={path: file()}).problem
    assert prepared(files={"/fused": file()}).setup.files == {"/fused": file()}


@pytest.mark.parametrize("mode", ["", "644x", "0888", "64", "00644", "rw-r--r--"])
def test_a_mode_that_is_not_octal_is_refused(mode: str):
    assert "is not octal" in refusal(files={"/x": file(mode=mode)}).problem


@pytest.mark.parametrize("mode", ["644", "0644", "4755", "04755"])
def test_modes_are_octal_with_and_without_a_zero(mode: str):
    assert prepared(files={"/x": file(mode=mode)}).setup.files["/x"].mode == mode


@pytest.mark.parametrize("content", ["a", "a===", "YQ= =", "Y Q==", "ä"])
def test_content_that_is_not_base64_is_refused_with_its_path(content: str):
    found = refusal(files={"/etc/x": SetupFile(content_b64=content)})
    assert found.field == "files"
    assert found.problem.startswith("'/etc/x' is not base64 (")


def test_all_files_together_are_limited():
    half = file(b"x" * (MAX_FILES_BYTES // 2))
    assert prepared(files={"/a": half, "/b": half}).duties.setup
    for asked in (
        {"files": {"/a": half, "/b": half, "/c": file()}},
        {"files": {"/a": half, "/b": half}, "agent": replace(DAEMON, files={"/c": file()})},
    ):
        with pytest.raises(PayloadTooLarge) as caught:
            prepared(**asked)
        assert caught.value.limit == MAX_FILES_BYTES


# -- secrets and script --------------------------------------------------------------------------------------------


def test_secrets_up_to_their_limits_are_kept():
    most = {f"{n:0256d}": "x" * 4096 for n in range(256)}
    assert prepared(secrets=most).duties.setup
    assert prepared(secrets={"a": "x" * (64 << 10)}).duties.setup


@pytest.mark.parametrize(
    ("secrets", "sentence"),
    [
        ({str(n): "x" for n in range(257)}, "257 secrets are more than 256"),
        ({"": "x"}, "is not 1 to 256 characters"),
        ({"x" * 257: "x"}, "is not 1 to 256 characters"),
        ({"a": "x" * ((64 << 10) + 1)}, "is larger than 65536 bytes"),
        ({"a": "ä" * (33 << 10)}, "is larger than 65536 bytes"),
        ({str(n): "x" * (64 << 10) for n in range(17)}, "together they are larger than 1048576 bytes"),
    ],
)
def test_secrets_beyond_their_limits_are_refused(secrets: dict[str, str], sentence: str):
    found = refusal(secrets=secrets)
    assert (found.field, sentence in found.problem) == ("secrets", True), found.problem


def test_a_refusal_does_not_tell_the_secret():
    assert "hunter2" not in refusal(secrets={"a": "hunter2" * 10_000}).message


def test_the_time_of_the_startup_script():
    assert prepared(startup_script="true").duties.startup_timeout_s == POLICY.default_startup_timeout_s
    most = POLICY.max_startup_timeout_s
    assert prepared(startup_script="true", startup_script_timeout_seconds=most).setup.startup_timeout_s == most
    for asked in (-1, most + 1):
        found = refusal(startup_script="true", startup_script_timeout_seconds=asked)
        assert found.field == "startup_script_timeout_seconds"
    assert refusal(startup_script="a\x00").field == "startup_script"


def test_a_manifest_is_read_with_the_secrets():
    assert refusal(manifest_inline=b64('{"version":"1","env":{"A":{"secret":"s"}}}')).field == "secrets"
    with pytest.raises(Unimplemented):
        prepared(manifest_inline=b64('{"version":"1","services":{"db":{}}}'))


# -- health check --------------------------------------------------------------------------------------------------


def test_defaults_of_a_health_check():
    http = HttpCheck(port=80)
    assert complete_healthcheck(http=http) == Healthcheck(http=http, interval_seconds=10, timeout_seconds=2, retries=3)
    short = complete_healthcheck(exec=["true"], interval_seconds=1)
    assert short == Healthcheck(exec=("true",), interval_seconds=1, timeout_seconds=1, retries=3)


def test_a_health_check_keeps_what_is_asked():
    asked = {"interval_seconds": 5, "timeout_seconds": 5, "retries": 1, "start_period_seconds": 60}
    assert complete_healthcheck(exec=("a", "b"), **asked) == Healthcheck(exec=("a", "b"), **asked)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "exactly one of http and exec"),
        ({"http": HttpCheck(port=80), "exec": ["true"]}, "exactly one of http and exec"),
        ({"http": HttpCheck(port=0)}, "http.port 0 is not within 1 to 65535"),
        ({"http": HttpCheck(port=65_536)}, "http.port 65536 is not within 1 to 65535"),
        ({"http": HttpCheck(port=80, path="health")}, "does not start with '/'"),
        ({"http": HttpCheck(port=80, path="/a b")}, "does not start with '/', or has blanks"),
        ({"http": HttpCheck(port=80, path="/a\r\n")}, "does not start with '/', or has blanks"),
        ({"exec": [""]}, "the program's name is empty"),
        ({"exec": ["true"], "interval_seconds": -1}, "interval_seconds -1 is not within 0 to 86400"),
        ({"exec": ["true"], "timeout_seconds": -1}, "timeout_seconds -1 is not within 0 to 86400"),
        ({"exec": ["true"], "retries": 1001}, "retries 1001 is not within 0 to 1000"),
        ({"exec": ["true"], "start_period_seconds": 86_401}, "start_period_seconds 86401 is not within"),
        ({"exec": ["true"], "timeout_seconds": 11}, "timeout_seconds 11 is longer than interval_seconds 10"),
    ],
)
def test_a_health_check_that_cannot_work_is_refused(asked: dict[str, Any], sentence: str):
    with pytest.raises(BadField) as caught:
        complete_healthcheck(**asked)
    assert caught.value.field.startswith("healthcheck")
    assert sentence in caught.value.problem


# -- what nobody may read ------------------------------------------------------------------------------------------


def test_all_values_that_nobody_may_read_are_found():
    manifest = '{"version":"1","env":{"MODE":"from the manifest","KEY":{"secret":"s"}}}'
    daemon = replace(DAEMON, env={"OWN": "of the daemon"}, auth_token="its-own-token")
    found = prepared(
        manifest_inline=b64(manifest),
        secrets={"s": "a secret", "unused": "another secret"},
        gateway_url="https://gw",
        gateway_token="gate-token",
        agent=daemon,
    )
    everything = {"a secret", "another secret", "from the manifest", "of the daemon", "its-own-token", "gate-token"}
    assert everything <= secret_values(found.setup)
    assert not {value for value in secret_values(found.setup) if "/fuse/" in value or "https" in value}
    assert "a-fresh-one" in secret_values(prepare(POLICY, auth_token="a-fresh-one", secrets={"a": "b"}).setup)
    assert secret_values(Setup()) == {""}
