"""Errors of limits, time and capacity."""

from fusevm.model.errors.base import Error


class PayloadTooLarge(Error):
    reason = "payload_too_large"
    code, status = "payload_too_large", 413
    template = "The request body is larger than {limit} bytes"
    limit: int


class FileTooLarge(Error):
    """A whole file is asked for in one JSON answer, or is to be edited in memory."""

    reason = "file_too_large"
    code, status = "payload_too_large", 413
    template = "{path!r} has {size} bytes; {operation} takes at most {limit}: read or write it in ranges"
    path: str
    size: int
    operation: str
    limit: int


class Unimplemented(Error):
    reason = "unimplemented"
    code, status = "unimplemented", 501
    template = "{feature} is not available: {why}"
    feature: str
    why: str


class NotSupported(Error):
    """The guest agent, or the driver, lacks what was asked for."""

    reason = "not_supported"
    code, status = "unimplemented", 501
    template = "{feature} is not supported here"
    feature: str


class PolicyNotEnforceable(Error):
    """What was asked of the network would not hold on this host, so it is refused rather than ignored."""

    reason = "policy_not_enforceable"
    code, status = "unimplemented", 501
    template = "This host cannot do {what}: {why}; use a host whose daemon runs as root"
    what: str
    why: str


class NoEncryptionKey(Error):
    """Nothing that must stay secret can be kept: PostgreSQL is used, and no key is set."""

    reason = "no_encryption_key"
    code, status = "unimplemented", 501
    template = (
        "The server takes no secrets, since it has no key to store {what} with; "
        "start it with TOKEN_ENCRYPTION_KEY (`openssl rand -hex 32`)"
    )
    what: str


class Unavailable(Error):
    code, status, retryable = "unavailable", 503, True


class NoCapacity(Unavailable):
    """No host can take the machine; `rejections` counts hosts per reason."""

    reason = "no_capacity"
    template = "No host can take this environment ({rejections}); free capacity or add a host"
    rejections: str


class NoHosts(Unavailable):
    reason = "no_hosts"
    template = "No host is registered; start one with `fuse up`, or register one with `fuse host register`"


class HostUnreachable(Unavailable):
    reason = "host_unreachable"
    template = "Host {id} does not answer ({problem})"
    id: str
    problem: str


class HostFull(Unavailable):
    """Admission on the host refused before any side effect."""

    reason = "host_full"
    template = (
        "The host has no room: {resource} needs {needed}, {free} are free; "
        "delete or stop machines there, or raise the host's limits"
    )
    resource: str
    needed: str
    free: str


class SlotFailed(Unavailable):
    """A slot's kernel objects could not be made, or are not in use."""

    reason = "slot_failed"
    template = "Network slot {index} is not usable: {problem}"
    index: int
    problem: str


class NoSpace(Unavailable):
    reason = "no_space"
    template = "No disk space left below {path}: {needed} bytes needed, {free} free; remove images or machines"
    path: str
    needed: int
    free: int


class NoSpaceInGuest(Unavailable):
    reason = "no_space_in_guest"
    template = "The machine's disk is full (writing {path!r}); ask for a larger storage_gb"
    path: str


class StoreFull(Unavailable):
    reason = "store_full"
    template = "The database cannot write ({problem}); free disk space"
    problem: str


class StoreUnreachable(Unavailable):
    """The database is away, or too busy. A change may have been carried out all the same."""

    reason = "store_unreachable"
    template = "The database does not answer ({problem}); try again shortly"
    problem: str


class ShuttingDown(Unavailable):
    reason = "shutting_down"
    template = "The server is shutting down; try again shortly"


class GuestUnreachable(Unavailable):
    reason = "guest_unreachable"
    template = "The guest agent of {id} does not answer ({problem})"
    id: str
    problem: str


class BootFailed(Unavailable):
    """The machine did not come up; its console's last words are in `problem`."""

    reason = "boot_failed"
    retryable = False
    template = "Machine {id} did not start: {problem}"
    id: str
    problem: str


class MachineEnded(Unavailable):
    """The machine shut down or crashed before its environment was ready."""

    reason = "machine_exited"
    retryable = False
    template = "The machine of {id} has ended: {problem}"
    id: str
    problem: str


class MachineGone(Unavailable):
    """The host no longer knows the machine of an environment that was being made."""

    reason = "machine_missing"
    retryable = False
    template = "The machine of {id} is gone: {problem}"
    id: str
    problem: str


class HostGone(Unavailable):
    """The host of an environment that was being made was given up."""

    reason = "host_lost"
    retryable = False
    template = "The host of {id} was lost: {problem}"
    id: str
    problem: str


class ToolMissing(Unavailable):
    """A program that the host daemon needs is not installed."""

    reason = "tool_missing"
    retryable = False
    template = "The program {program} is not installed; install it with `apt-get install {package}` or run `make setup`"
    program: str
    package: str


class VmmMissing(Unavailable):
    reason = "vmm_missing"
    retryable = False
    template = "{program} is not installed; {remedy}"
    program: str
    remedy: str


class VmmUnsuitable(Unavailable):
    """The VMM that is installed is none that machines may be run with."""

    reason = "vmm_unsuitable"
    retryable = False
    template = "{program} is refused: {problem}"
    program: str
    problem: str


class Timeout(Error):
    code, status, retryable = "timeout", 504, True
    reason = "timeout"
    template = "{what} took longer than {limit_s} s"
    what: str
    limit_s: int


class BootTimeout(Error):
    """The machine did not come up before the deadline of its environment. Ends the environment."""

    reason = "boot_timeout"
    code, status = "timeout", 504
    template = "The machine of {id} did not come up in time: {problem}"
    id: str
    problem: str


class SetupTimeout(Error):
    """Files, startup script and daemon were not in place before the deadline. Ends the environment."""

    reason = "setup_timeout"
    code, status = "timeout", 504
    template = "The setup of {id} was not done in time: {problem}"
    id: str
    problem: str
