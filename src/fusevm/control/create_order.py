"""From the body of a create to what is asked for: complete, checked, and its secrets sealed."""

import secrets
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from fusevm.control.config import ControlConfig
from fusevm.control.entry import Asked
from fusevm.control.plane import Plane
from fusevm.core.setup import Prepared, complete_healthcheck, prepare
from fusevm.core.spec import complete
from fusevm.model.environment import Spec
from fusevm.model.errors import BadField, SnapshotNotFound, Unimplemented
from fusevm.model.network import Exposure, Network, Rule, Transport, Verdict
from fusevm.model.setup import AGENT_PATH, AgentSpec, Healthcheck, HttpCheck, Restart, SetupFile
from fusevm.model.snapshot import Snapshot
from fusevm.wire import rest

#: Fields that are part of the API and not honoured. Empty values mean unset and pass.
_LATER = {
    "desktop": "images with a desktop are not built yet; leave it out",
}
_LATER_IN_SPEC = {
    "gpus": "machines with GPUs are not built yet; leave it out",
    "gpu_kind": "machines with GPUs are not built yet; leave it out",
    "gpu_profile": "machines with GPUs are not built yet; leave it out",
    "huge_pages": "it is not built yet; leave it out",
}


async def read_order(plane: Plane, tenant: str, uid: str, body: rest.CreateRequest) -> Asked:
    """Check and complete a create for the environment `uid` of a tenant.

    Raises BadField, PayloadTooLarge, SnapshotNotFound, SnapshotNotReady, WrongState, NoEncryptionKey, and Unimplemented
    naming the field.
    """
    _refuse_later(body)
    seed = await _seed(plane, tenant, body.seed_snapshot_id or "")
    prepared = _prepare(plane.config, body)
    spec = _spec(plane, body, seed, prepared.duties.port)
    sealed = plane.vault.seal(uid, prepared.setup) if prepared.duties.setup else None
    pinned_to = seed.host_id if seed is not None else ""
    return Asked(spec=spec, duties=prepared.duties, sealed=sealed, pinned_to=pinned_to)


def new_token() -> str:
    """A credential for one machine."""
    return secrets.token_urlsafe(32)


def _refuse_later(body: rest.CreateRequest) -> None:
    for name, why in _LATER.items():
        if getattr(body, name):
            raise Unimplemented(feature=f"the field {name}", why=why)
    for name, why in _LATER_IN_SPEC.items():
        if getattr(body.spec, name, None):
            raise Unimplemented(feature=f"the field spec.{name}", why=why)
    _check_on_host_loss(body.on_host_loss or "fail")
    if body.egress is not None and body.egress.mode not in ("", "direct"):
        raise Unimplemented(feature=f"egress mode {body.egress.mode!r}", why="only direct egress is available")


def _check_on_host_loss(asked: str) -> None:
    if asked == "restore":
        why = "snapshots cannot leave their host yet; leave it out, and create anew when the host is lost"
        raise Unimplemented(feature='on_host_loss "restore"', why=why)
    if asked != "fail":
        raise BadField(field="on_host_loss", problem=f"{asked[:40]!r} is neither fail nor restore")


async def _seed(plane: Plane, tenant: str, id: str) -> Snapshot | None:  # noqa: A002 - the record's field
    if not id:
        return None
    found = await plane.store.snapshot(id)
    if found is None or tenant not in ("", found.tenant):
        raise SnapshotNotFound(id=id)
    return found


def _spec(plane: Plane, body: rest.CreateRequest, seed: Snapshot | None, agent_port: int) -> Spec:
    asked = body.spec or rest.SpecInput()
    return complete(
        plane.config.policy,
        cpus=asked.cpus,
        ram_mb=asked.ram_mb,
        storage_gb=asked.storage_gb,
        region=asked.region,
        image=asked.image,
        arch=asked.arch,
        host_id=asked.host_id,
        labels=asked.labels,
        max_runtime_seconds=asked.max_runtime_seconds,
        idle_timeout_seconds=asked.idle_timeout_seconds,
        network=read_network(body.network),
        expose=_exposures(body.expose or (), agent_port),
        seed=seed,
        queue_seconds=body.queue_seconds,
    )


def read_network(asked: rest.NetworkInput | None) -> Network:
    """The policy that a request asks for, not checked yet."""
    if asked is None:
        return Network()
    rules = tuple(asked.rules or ())
    # Whoever names what may be reached does not mean the rest, too.
    internet = asked.internet if asked.internet is not None else not any(_narrows(rule) for rule in rules)
    return Network(
        internet=internet, rules=rules, ingress_kbit=asked.ingress_kbit or 0, egress_kbit=asked.egress_kbit or 0
    )


def _narrows(rule: Rule) -> bool:
    return rule.action is Verdict.ALLOW


def _exposures(asked: Iterable[rest.ExposeInput], agent_port: int) -> list[Exposure]:
    """What is published: what was asked for, and the port of the daemon."""
    found = [
        Exposure(
            port=one.port, protocol=one.protocol or Transport.TCP, name=one.name or "", host_port=one.host_port or 0
        )
        for one in asked
    ]
    has_agent = any((one.port, one.protocol) == (agent_port, Transport.TCP) for one in found)
    return found if has_agent or not agent_port else [*found, Exposure(port=agent_port)]


def _prepare(config: ControlConfig, body: rest.CreateRequest) -> Prepared:
    return prepare(
        config.policy,
        auth_token=new_token(),
        manifest_inline=body.manifest_inline or "",
        secrets=body.secrets or {},
        startup_script=body.startup_script or "",
        startup_script_timeout_seconds=body.startup_script_timeout_seconds or 0,
        files=_files(body.files or {}),
        gateway_url=body.gateway_url or "",
        gateway_token=body.gateway_token or "",
        healthcheck=_healthcheck(body.healthcheck) if body.healthcheck is not None else None,
        agent=_agent(config, body.agent) if body.agent else None,
    )


def _files(asked: Mapping[str, str | rest.FileInput]) -> dict[str, SetupFile]:
    return {path: _file(content) for path, content in asked.items()}


def _file(content: str | rest.FileInput) -> SetupFile:
    if isinstance(content, str):
        return SetupFile(content_b64=content)
    return SetupFile(content_b64=content.content_b64, mode=content.mode)


def _healthcheck(asked: rest.HealthcheckInput) -> Healthcheck:
    http = HttpCheck(port=asked.http.port, path=asked.http.path or "/") if asked.http is not None else None
    return complete_healthcheck(
        http=http,
        exec=asked.exec or (),
        interval_seconds=asked.interval_seconds or 0,
        timeout_seconds=asked.timeout_seconds or 0,
        retries=asked.retries or 0,
        start_period_seconds=asked.start_period_seconds or 0,
    )


def _agent(config: ControlConfig, asked: str | rest.AgentInput) -> AgentSpec:
    """The daemon: what is given, else what its profile says, else the default download."""
    if isinstance(asked, str):
        asked = rest.AgentInput(profile=asked)
    spec = _with_download(_profile(config, asked.profile or ""), asked.download_url or "", asked.sha256 or "")
    given = {
        name: value for name in ("auth_token", "gateway", "gateway_token", "port") if (value := getattr(asked, name))
    }
    if asked.command:
        given["command"] = tuple(asked.command)
    if asked.drain_command:
        given["drain_command"] = tuple(asked.drain_command)
    if asked.restart:
        given["restart"] = Restart(asked.restart)
    spec = replace(spec, files=spec.files | _files(asked.files or {}), env=spec.env | (asked.env or {}), **given)
    if spec.download_url or not config.agent_download_url or spec.command[:1] not in ((), (AGENT_PATH,)):
        return spec
    return _with_download(spec, config.agent_download_url, spec.sha256 or config.agent_download_sha256)


def _with_download(spec: AgentSpec, url: str, sha256: str) -> AgentSpec:
    """With this URL and its digest. A digest alone is about the URL that is there or will be; a URL alone has none."""
    if url:
        return replace(spec, download_url=url, sha256=sha256)
    return replace(spec, sha256=sha256 or spec.sha256)


def _profile(config: ControlConfig, name: str) -> AgentSpec:
    if not name:
        return AgentSpec()
    found = config.agents.get(name)
    if found is None:
        known = ", ".join(sorted(config.agents)) or "none; they are set in the settings file"
        raise BadField(field="agent", problem=f"there is no profile {name[:80]!r}; known: {known}")
    return found
