"""The state of a microVM and what each request does to it: the reference's rules. Pure.

`Rules.answer` decides; what has to be done in the world is in the answer's `effect`, for the process to carry out.
"""

import json
import re
from typing import Any, Final, Literal, NamedTuple

from fusevm.testing.fake_firecracker.schema import BODIES, find_problem

VERSION: Final = "1.16.1"
MAX_BODY: Final = 51_200
_MAX_DEVICES: Final = 17
_MAX_TAP_NAME: Final = 15
_RESOURCE_ID = re.compile(r"[A-Za-z0-9_]{1,64}")
State = Literal["Not started", "Running", "Paused"]
#: Requests that configure a boot: none may come before a load, all must come before the start.
_BOOT: Final = frozenset(
    {
        "/machine-config",
        "/boot-source",
        "/drives/{id}",
        "/network-interfaces/{id}",
        "/vsock",
        "/mmds/config",
        "/entropy",
        "/balloon",
    }
)
#: Once each.
_ONCE: Final = frozenset({"/logger", "/metrics", "/serial"})


class Answer(NamedTuple):
    """What a request is answered with, and what is to be done first."""

    status: int
    body: dict[str, Any] | None = None
    effect: str = ""


class Rules:
    """One microVM's configuration and state."""

    def __init__(self, instance_id: str) -> None:
        self._id = instance_id
        self.state: State = "Not started"
        #: Bodies of the accepted configuration calls, by path.
        self.config: dict[str, dict[str, Any]] = {}
        #: A boot resource was configured: nothing may be loaded any more.
        self._is_boot_begun = False
        #: Paused by a request, and no snapshot was taken since (upstream issue 6074).
        self._is_bare_pause = False
        #: New connections from the host hang for ever.
        self.is_deaf = False
        #: What the guest may read as metadata; None: never set, and lost by a snapshot.
        self.metadata: Any = None

    def answer(self, method: str, path: str, content: bytes) -> Answer:
        """Decide about one request."""
        if len(content) > MAX_BODY:
            return Answer(413, {"fault_message": "HTTP payload is larger than the limit"})
        if method == "GET":
            return self._read(path, content)
        if path == "/mmds" and method in ("PUT", "PATCH"):
            return self._set_metadata(method, content)
        pattern = _pattern(path)
        fields = BODIES.get((method, pattern))
        if fields is None:
            return _fault(f"Invalid request method and/or path: {method} {path}.")
        if not content:
            return _fault(f"Empty {method} request.")
        try:
            body = json.loads(content)
        except ValueError as error:
            return _fault(f"An error occurred when deserializing the json body of a request: {error}.")
        problem = find_problem(body, fields) or _id_problem(path, pattern, body)
        if problem:
            return _fault(f"An error occurred when deserializing the json body of a request: {problem}.")
        return self._act(method, pattern, path, body)

    def _read(self, path: str, content: bytes) -> Answer:
        if content:
            return _fault("GET request cannot have a body.")
        match path:
            case "/":
                info = {"id": self._id, "state": self.state, "vmm_version": VERSION, "app_name": "Firecracker"}
                return Answer(200, info)
            case "/version":
                return Answer(200, {"firecracker_version": VERSION})
            case "/machine-config":
                return Answer(200, self.config.get(path, {"vcpu_count": 1, "mem_size_mib": 128}))
            case "/vm/config":
                return Answer(200, {key.strip("/"): value for key, value in self.config.items()})
            case "/balloon" if "/balloon" in self.config:
                return Answer(200, self.config["/balloon"])
            case "/mmds":
                return Answer(200, self.metadata if self.metadata is not None else {})
            case _:
                return _fault(f"Invalid request method and/or path: GET {path}.")

    def _set_metadata(self, method: str, content: bytes) -> Answer:
        try:
            body = json.loads(content)
        except ValueError as error:
            return _fault(f"An error occurred when deserializing the json body of a request: {error}.")
        if method == "PATCH" and self.metadata is None:
            return _fault("The MMDS data store is not initialized.")
        self.metadata = _merged(self.metadata, body) if method == "PATCH" else body
        return Answer(204)

    def _act(self, method: str, pattern: str, path: str, body: dict[str, Any]) -> Answer:
        is_started = self.state != "Not started"
        if pattern == "/actions":
            return self._action(body["action_type"])
        if pattern == "/vm":
            return self._change_state(body["state"])
        if pattern == "/snapshot/create":
            return self._snapshot()
        if pattern == "/snapshot/load":
            return self._load(body)
        if method == "PATCH" and pattern != "/machine-config":
            if not is_started:
                return _fault("The requested operation is not supported before starting the microVM.")
            return self._change(pattern, path, body)
        if is_started:
            return _fault("The requested operation is not supported after starting the microVM.")
        return self._configure(pattern, path, body)

    def _configure(self, pattern: str, path: str, body: dict[str, Any]) -> Answer:
        if pattern in _ONCE and path in self.config:
            return _fault(f"{path.strip('/').capitalize()} is already initialized.")
        problem = self._config_problem(pattern, path, body)
        if problem:
            return _fault(problem)
        self.config[path] = {**self.config.get(path, {}), **body} if pattern == "/machine-config" else body
        self._is_boot_begun = self._is_boot_begun or pattern in _BOOT
        return Answer(204, effect=path if pattern in _ONCE else "")

    def _config_problem(self, pattern: str, path: str, body: dict[str, Any]) -> str:
        match pattern:
            case "/machine-config":
                return _machine_problem(body)
            case "/boot-source":
                return "The kernel command line is too long." if len(body.get("boot_args") or "") > 2048 else ""
            case "/drives/{id}":
                roots = [
                    one for one in self.config if one.startswith("/drives/") and self.config[one]["is_root_device"]
                ]
                if body["is_root_device"] and set(roots) - {path}:
                    return "A root block device already exists!"
                return "" if body.get("path_on_host") or body.get("socket") else "Invalid drive: no path."
            case "/mmds/config":
                known = {one.rpartition("/")[2] for one in self.config if one.startswith("/network-interfaces/")}
                if not body["network_interfaces"] or set(body["network_interfaces"]) - known:
                    return "The list of network interface IDs provided contains at least one ID that does not exist."
                return ""
            case "/network-interfaces/{id}":
                if len(body["host_dev_name"]) > _MAX_TAP_NAME or not 68 <= body.get("mtu", 1500) <= 65_535:
                    return "Invalid network interface configuration."
                macs = {c.get("guest_mac") for p, c in self.config.items() if p.startswith("/network") and p != path}
                return "The MAC address is already in use." if body.get("guest_mac") in macs - {None} else ""
            case "/vsock":
                return "" if body["guest_cid"] >= 3 else "The guest CID is reserved."
            case _:
                return ""

    def _change(self, pattern: str, path: str, body: dict[str, Any]) -> Answer:
        if path not in self.config:
            return _fault(f"Device not found: {path.rpartition('/')[2]}.")
        self.config[path] = {**self.config[path], **body}
        return Answer(204, effect=f"change {path}" if pattern == "/drives/{id}" else "")

    def _action(self, kind: str) -> Answer:
        is_started = self.state != "Not started"
        if kind == "InstanceStart":
            if is_started:
                return _fault("The requested operation is not supported after starting the microVM.")
            if "/boot-source" not in self.config:
                return _fault("Cannot start microvm without kernel configuration.")
            devices = sum(path.split("/")[1] in ("drives", "network-interfaces", "vsock") for path in self.config)
            if devices > _MAX_DEVICES:
                return _fault("Too many devices for the MMIO transport.")
            self.state = "Running"
            return Answer(204, effect="start")
        if not is_started:
            return _fault("The requested operation is not supported before starting the microVM.")
        return Answer(204, effect="flush" if kind == "FlushMetrics" else "ctrl-alt-del")

    def _change_state(self, wanted: str) -> Answer:
        if self.state == "Not started":
            return _fault("The requested operation is not supported before starting the microVM.")
        if wanted == "Paused":
            self._is_bare_pause = self._is_bare_pause or self.state == "Running"
            self.state = "Paused"
            return Answer(204, effect="pause")
        if self.state == "Paused" and self._is_bare_pause:
            self.is_deaf = True
        self._is_bare_pause = False
        self.state = "Running"
        return Answer(204, effect="resume")

    def _snapshot(self) -> Answer:
        if self.state != "Paused":
            return _fault("Cannot create a snapshot: the microVM is not paused.")
        self._is_bare_pause = False
        return Answer(204, effect="snapshot")

    def _load(self, body: dict[str, Any]) -> Answer:
        if self.state != "Not started":
            return _fault("The requested operation is not supported after starting the microVM.")
        if self._is_boot_begun:
            return _fault("Loading a microVM snapshot not allowed after configuring boot-specific resources.")
        if ("mem_backend" in body) == ("mem_file_path" in body):
            return _fault("Load snapshot error: exactly one of `mem_backend` and `mem_file_path` must be given.")
        self.state = "Running" if body.get("resume_vm") else "Paused"
        return Answer(204, effect="load")


def _pattern(path: str) -> str:
    words = path.split("/")
    return f"/{words[1]}/{{id}}" if len(words) == 3 and words[1] in ("drives", "network-interfaces") else path


def _merged(old: Any, new: Any) -> Any:
    """RFC 7396, JSON merge patch."""
    if not isinstance(new, dict):
        return new
    base = dict(old) if isinstance(old, dict) else {}
    for name, value in new.items():
        if value is None:
            base.pop(name, None)
        else:
            base[name] = _merged(base.get(name), value)
    return base


def _id_problem(path: str, pattern: str, body: dict[str, Any]) -> str:
    if "{id}" not in pattern:
        return ""
    name = path.rpartition("/")[2]
    if not _RESOURCE_ID.fullmatch(name):
        return f"Invalid char in id {name!r}"
    given = body.get("drive_id", body.get("iface_id"))
    return "" if given == name else "The id from the path does not match the id from the body!"


def _machine_problem(body: dict[str, Any]) -> str:
    count = body.get("vcpu_count", 1)
    if not 1 <= count <= 32:
        return "The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled."
    if body.get("smt") and count > 1 and count % 2:
        return "The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled."
    return "" if body.get("mem_size_mib", 1) > 0 else "The memory size (MiB) is invalid."


def _fault(message: str) -> Answer:
    return Answer(400, {"fault_message": message})
