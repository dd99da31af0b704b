"""What a create brings along, checked and made complete: from plain values to a `Setup` and the `Duties` in the record.

Pure: the generated token is an argument. Every refusal names the field as the request spells it. What ends up in which
file below the guest's tmpfs `/fuse` is decided here and nowhere else (docs/agent-spec.md describes it for users).
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from fusevm.core.manifest import Manifest, parse_manifest
from fusevm.core.policy import Policy
from fusevm.model.errors import BadField, PayloadTooLarge
from fusevm.model.setup import AGENT_PATH, AgentSpec, Duties, Healthcheck, HttpCheck, Setup, SetupFile

#: The guest's tmpfs.
FUSE = "/fuse"
MANIFEST, SECRETS, ENV, TOKEN, GATEWAY = "manifest.json", "secrets.json", "env", "auth-token", "gateway.json"
_RESERVED = frozenset({MANIFEST, SECRETS, ENV, TOKEN, GATEWAY, AGENT_PATH.removeprefix(FUSE + "/")})

MAX_SECRETS = 256
MAX_SECRET_NAME = 256
MAX_SECRET_BYTES = 64 << 10
MAX_SECRETS_BYTES = 1 << 20
MAX_FILES_BYTES = 512 << 10
MAX_TEXT = 4_096
MAX_ARGUMENTS = 1_024
#: Seconds: a day.
MAX_CHECK_SECONDS = 86_400
MAX_CHECK_RETRIES = 1_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MODE = re.compile(r"0?[0-7]{3}|0?[1-7][0-7]{3}")
#: Visible ASCII: a token goes into headers and files.
_CREDENTIAL = re.compile(r"[\x21-\x7e]{1,4096}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Replaced tokens that are kept.
MAX_FORMER_TOKENS = 16
_NO_FILES: Mapping[str, SetupFile] = {}
_NO_SECRETS: Mapping[str, str] = {}
#: Variables of the daemon that we set, and whose values everybody may read.
_NO_SECRETS_IN = frozenset({"FUSE_AUTH_TOKEN_FILE", "FUSE_SECRETS_FILE", "FUSE_MANIFEST_FILE", "FUSE_GATEWAY_URL"})


class Prepared(msgspec.Struct, frozen=True):
    """What to seal, and what the record is told of it. Without `duties.setup` there is nothing to seal."""

    setup: Setup
    duties: Duties


def prepare(
    policy: Policy,
    *,
    auth_token: str,
    manifest_inline: str = "",
    secrets: Mapping[str, str] = _NO_SECRETS,
    startup_script: str = "",
    startup_script_timeout_seconds: int = 0,
    files: Mapping[str, SetupFile] = _NO_FILES,
    gateway_url: str = "",
    gateway_token: str = "",
    healthcheck: Healthcheck | None = None,
    agent: AgentSpec | None = None,
) -> Prepared:
    """Check everything and lay it out. `auth_token` is a fresh one; an AgentSpec that has its own keeps it.

    Raises BadField, Unimplemented for manifest fields that do nothing here, and PayloadTooLarge for the files.
    """
    _check_secrets(secrets)
    manifest = parse_manifest(manifest_inline, secrets)
    _check_plain("startup_script", startup_script)
    timeout_s = _startup_timeout(startup_script_timeout_seconds, policy)
    gateway = _gateway(gateway_url, gateway_token, agent)
    if agent is not None:
        agent = _complete_agent(agent, auth_token, gateway)
    below, apart = _sort_files(files, agent)
    brings = bool(manifest_inline or secrets or startup_script or files or healthcheck or agent or gateway.url)
    if not (brings or gateway.token):
        return Prepared(Setup(), Duties())
    token = agent.auth_token if agent is not None else auth_token
    setup = Setup(
        fuse=below | _own_files(manifest, secrets, token, gateway),
        files=apart,
        env=manifest.env,
        workspace=manifest.workspace,
        startup_script=startup_script,
        startup_timeout_s=timeout_s,
        agent=agent if agent is None else replace(agent, files={}),
        healthcheck=healthcheck,
    )
    return Prepared(setup, _duties(setup))


def with_token(setup: Setup, auth_token: str) -> Setup:
    """The same setup with another token in all its places: the file, and the daemon's settings. The one before is kept
    among the former ones: nobody knows yet whether the daemon takes the new one."""
    fuse = setup.fuse | {TOKEN: _private(auth_token)}
    former = (*setup.former_tokens, *filter(None, [_content(setup, TOKEN)]))[-MAX_FORMER_TOKENS:]
    if setup.agent is None:
        return replace(setup, fuse=fuse, former_tokens=former)
    env = setup.agent.env | {"FUSE_AUTH_TOKEN": auth_token}
    agent = replace(setup.agent, auth_token=auth_token, env=env)
    return replace(setup, fuse=fuse, agent=agent, former_tokens=former)


def secret_values(setup: Setup) -> set[str]:
    """What nobody may read in events, errors and logs: values of secrets and variables, tokens, former ones too."""
    found = {*setup.env.values(), _content(setup, TOKEN), *setup.former_tokens}
    found.update(msgspec.json.decode(_content(setup, SECRETS) or "{}", type=dict[str, str]).values())
    found.add(msgspec.json.decode(_content(setup, GATEWAY) or "{}", type=_Gateway).token)
    if setup.agent is not None:
        found |= {setup.agent.auth_token, setup.agent.gateway_token}
        found.update(value for name, value in setup.agent.env.items() if name not in _NO_SECRETS_IN)
    return found


def _content(setup: Setup, name: str) -> str:
    """Text of one of our own files; empty: there is none."""
    file = setup.fuse.get(name)
    return base64.b64decode(file.content_b64).decode() if file is not None else ""


def complete_healthcheck(
    *,
    http: HttpCheck | None = None,
    exec: Sequence[str] = (),  # noqa: A002 - the field's name
    interval_seconds: int = 0,
    timeout_seconds: int = 0,
    retries: int = 0,
    start_period_seconds: int = 0,
) -> Healthcheck:
    """Fill in defaults (0 means unset) and check the rules. Raises BadField."""
    if (http is None) == (not exec):
        raise _bad_check("give exactly one of http and exec")
    if http is not None and not 1 <= http.port <= 65_535:
        raise _bad_check(f"http.port {http.port} is not within 1 to 65535")
    if http is not None and not (http.path.startswith("/") and http.path.isprintable() and " " not in http.path):
        raise _bad_check(f"http.path {http.path[:80]!r} does not start with '/', or has blanks in it")
    _check_command("healthcheck.exec", exec)
    default = Healthcheck()
    interval_s = _check_number("interval_seconds", interval_seconds, MAX_CHECK_SECONDS) or default.interval_seconds
    timeout_s = _check_number("timeout_seconds", timeout_seconds, MAX_CHECK_SECONDS)
    if timeout_s > interval_s:
        raise _bad_check(f"timeout_seconds {timeout_s} is longer than interval_seconds {interval_s}")
    return Healthcheck(
        http=http,
        exec=tuple(exec),
        interval_seconds=interval_s,
        timeout_seconds=timeout_s or min(default.timeout_seconds, interval_s),
        retries=_check_number("retries", retries, MAX_CHECK_RETRIES) or default.retries,
        start_period_seconds=_check_number("start_period_seconds", start_period_seconds, MAX_CHECK_SECONDS),
    )


def render_env(env: Mapping[str, str]) -> str:
    """Lines `KEY='value'` that `. /fuse/env` reads exactly as they are, whatever is in the values."""
    return "".join(f"{name}='{value.replace(_QUOTE, _QUOTED)}'\n" for name, value in env.items())


_QUOTE, _QUOTED = "'", "'\\''"


# -- layout --------------------------------------------------------------------------------------------------------


class _Gateway(msgspec.Struct, frozen=True):
    url: str = ""
    token: str = ""


def _own_files(manifest: Manifest, secrets: Mapping[str, str], token: str, gateway: _Gateway) -> dict[str, SetupFile]:
    found = {
        MANIFEST: _private(manifest.text),
        SECRETS: _private(_json(dict(secrets))),
        ENV: _private(render_env(manifest.env)),
        TOKEN: _private(token),
    }
    if gateway != _Gateway():
        found[GATEWAY] = _private(_json({"url": gateway.url, "token": gateway.token}))
    return found


def _private(text: str) -> SetupFile:
    return SetupFile(content_b64=base64.b64encode(text.encode()).decode(), mode="0600")


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _duties(setup: Setup) -> Duties:
    return Duties(
        setup=True,
        startup_timeout_s=setup.startup_timeout_s if setup.startup_script else 0,
        agent=setup.agent is not None,
        port=setup.agent.port if setup.agent is not None else 0,
        healthcheck=setup.healthcheck is not None,
    )


# -- the daemon ----------------------------------------------------------------------------------------------------


def _gateway(url: str, token: str, agent: AgentSpec | None) -> _Gateway:
    """The daemon's own gateway goes before the request's. A token goes to no other gateway than it was given with."""
    if agent is not None and agent.gateway:
        if token and not agent.gateway_token and url not in ("", agent.gateway):
            problem = "it is for gateway_url, and the daemon's own gateway is another one; give agent.gateway_token"
            raise BadField(field="gateway_token", problem=problem)
        url = agent.gateway
    own_token = agent.gateway_token if agent is not None else ""
    if url and (len(url) > MAX_TEXT or not url.isprintable() or " " in url):
        field = "agent.gateway" if agent is not None and agent.gateway else "gateway_url"
        raise BadField(field=field, problem=f"{url[:80]!r} is no address")
    _check_credential("agent.gateway_token", own_token)
    _check_credential("gateway_token", token)
    return _Gateway(url, own_token or token)


def _complete_agent(agent: AgentSpec, fresh_token: str, gateway: _Gateway) -> AgentSpec:
    """The daemon with its token, its gateway, and the variables by which it finds everything."""
    _check_agent(agent)
    token = agent.auth_token or fresh_token
    found = {
        "FUSE_AUTH_TOKEN": token,
        "FUSE_AUTH_TOKEN_FILE": f"{FUSE}/{TOKEN}",
        "FUSE_SECRETS_FILE": f"{FUSE}/{SECRETS}",
        "FUSE_MANIFEST_FILE": f"{FUSE}/{MANIFEST}",
        "FUSE_GATEWAY_URL": gateway.url,
        "FUSE_GATEWAY_TOKEN": gateway.token,
    }
    return replace(
        agent,
        auth_token=token,
        gateway=gateway.url,
        gateway_token=gateway.token,
        command=agent.command or (AGENT_PATH,),
        env=agent.env | {name: value for name, value in found.items() if value},
    )


def _check_agent(agent: AgentSpec) -> None:
    if not agent.command and not agent.download_url:
        raise BadField(field="agent", problem="give a command, or a download_url to fetch the daemon from")
    if agent.download_url:
        _check_url("agent.download_url", agent.download_url)
    if agent.sha256 and not _SHA256.fullmatch(agent.sha256):
        raise BadField(field="agent.sha256", problem="use 64 hex digits in lower case")
    if agent.sha256 and not agent.download_url:
        raise BadField(field="agent.sha256", problem="there is no download_url that it could be about")
    _check_command("agent.command", agent.command)
    _check_command("agent.drain_command", agent.drain_command)
    _check_credential("agent.auth_token", agent.auth_token)
    if not 0 <= agent.port <= 65_535:
        raise BadField(field="agent.port", problem=f"{agent.port} is not within 0 to 65535")
    check_variables("agent.env", agent.env)


def _check_url(field: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or len(url) > MAX_TEXT or not url.isprintable() or " " in url:
        raise BadField(field=field, problem=f"{url[:80]!r} is no http or https URL")


def _check_command(field: str, command: Sequence[str]) -> None:
    if len(command) > MAX_ARGUMENTS:
        raise BadField(field=field, problem=f"{len(command)} arguments are more than {MAX_ARGUMENTS}")
    if command and not command[0]:
        raise BadField(field=field, problem="the program's name is empty")
    for argument in command:
        _check_plain(field, argument)


def _check_credential(field: str, text: str) -> None:
    if text and not _CREDENTIAL.fullmatch(text):
        raise BadField(field=field, problem="use 1 to 4096 visible ASCII characters without blanks")


def check_variables(field: str, env: Mapping[str, str]) -> None:
    """Raises BadField unless these can be variables of a process."""
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name):
            raise BadField(field=field, problem=f"{name[:80]!r} is no name of a variable")
        _check_plain(f"{field}.{name[:80]}", value)


# -- files, secrets, script ----------------------------------------------------------------------------------------


def _sort_files(
    files: Mapping[str, SetupFile], agent: AgentSpec | None
) -> tuple[dict[str, SetupFile], dict[str, SetupFile]]:
    """The daemon's files below /fuse by relative path, and all other files by absolute path."""
    total = 0
    below: dict[str, SetupFile] = {}
    apart: dict[str, SetupFile] = {}
    for path, file in files.items():
        total += _check_file("files", path, file)
        if _is_below_fuse(path):
            raise BadField(field="files", problem=f"{path[:80]!r} is below {FUSE}, which is not for files of your own")
        apart[path] = file
    for path, file in agent.files.items() if agent is not None else ():
        total += _check_file("agent.files", path, file)
        relative = path.removeprefix(FUSE + "/")
        if path in apart or path == FUSE or (relative != path and relative.split("/")[0] in _RESERVED):
            raise BadField(field="agent.files", problem=f"{path[:80]!r} is taken")
        if _is_below_fuse(path):
            below[relative] = file
        else:
            apart[path] = file
    if total > MAX_FILES_BYTES:
        raise PayloadTooLarge(limit=MAX_FILES_BYTES)
    return below, apart


def _is_below_fuse(path: str) -> bool:
    return path == FUSE or path.startswith(FUSE + "/")


def _check_file(field: str, path: str, file: SetupFile) -> int:
    """Size of the content in bytes."""
    is_clean = path.startswith("/") and not {"", ".", ".."} & set(path[1:].split("/"))
    if not is_clean or len(path) > MAX_TEXT or not {"\x00", "\n", "\r"}.isdisjoint(path):
        raise BadField(field=field, problem=f"{path[:80]!r} is no clean absolute path of a file")
    if not _MODE.fullmatch(file.mode):
        raise BadField(field=field, problem=f"mode {file.mode[:80]!r} of {path[:80]!r} is not octal, such as 0644")
    return len(decode_base64(field, file.content_b64, path))


def decode_base64(field: str, text: str, what: str) -> bytes:
    """Raises BadField unless it is base64 (RFC 4648, with padding, nothing else in between)."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadField(field=field, problem=f"{what[:80]!r} is not base64 ({error})") from error


def _check_secrets(secrets: Mapping[str, str]) -> None:
    if len(secrets) > MAX_SECRETS:
        raise BadField(field="secrets", problem=f"{len(secrets)} secrets are more than {MAX_SECRETS}")
    total = 0
    for name, value in secrets.items():
        size = len(value.encode(errors="surrogatepass"))
        if not 1 <= len(name) <= MAX_SECRET_NAME:
            raise BadField(field="secrets", problem=f"the name {name[:80]!r} is not 1 to {MAX_SECRET_NAME} characters")
        if size > MAX_SECRET_BYTES:
            raise BadField(field="secrets", problem=f"{name[:80]!r} is larger than {MAX_SECRET_BYTES} bytes")
        total += size
    if total > MAX_SECRETS_BYTES:
        raise BadField(field="secrets", problem=f"together they are larger than {MAX_SECRETS_BYTES} bytes")


def _startup_timeout(asked: int, policy: Policy) -> int:
    if not asked:
        return policy.default_startup_timeout_s
    if not 1 <= asked <= policy.max_startup_timeout_s:
        problem = f"{asked} is not within 1 to {policy.max_startup_timeout_s}"
        raise BadField(field="startup_script_timeout_seconds", problem=problem)
    return asked


def _check_plain(field: str, text: str) -> None:
    if "\x00" in text:
        raise BadField(field=field, problem="a NUL character cannot be passed to a program")


def _check_number(name: str, asked: int, most: int) -> int:
    if not 0 <= asked <= most:
        raise _bad_check(f"{name} {asked} is not within 0 to {most}")
    return asked


def _bad_check(problem: str) -> BadField:
    return BadField(field="healthcheck", problem=problem)
