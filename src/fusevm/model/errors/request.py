"""Errors of a request that can never work as it is."""

from fusevm.model.errors.base import Error


class InvalidArgument(Error):
    """The caller sent something that can never work as it is."""

    code, status = "invalid_argument", 400


class BadField(InvalidArgument):
    """One field of a request is wrong."""

    reason = "bad_field"
    template = "{field}: {problem}"
    field: str
    problem: str


class BadJson(InvalidArgument):
    """The body is not the JSON that the route takes."""

    reason = "bad_json"
    template = "The request body does not fit: {problem}"
    problem: str


class BadTaskId(InvalidArgument):
    reason = "bad_task_id"
    template = (
        "task_id {task_id!r} is not usable: use 1 to 128 letters, digits, '.', '_' and '-', "
        "starting with a letter or digit"
    )
    task_id: str


class UnknownAction(InvalidArgument):
    reason = "unknown_action"
    template = "Unknown action {action!r}; this route knows: {known}"
    action: str
    known: str


class ImageNotFound(InvalidArgument):
    """The image named in a create exists on no host that could take the machine."""

    reason = "image_not_found"
    template = (
        "There is no image {image!r}; there are: {known}. "
        "On the host, `fuse image pull {image}` fetches it from a registry, `fuse image build` makes one"
    )
    image: str
    #: Names of those that there are, or `none`.
    known: str


class CommandNotFound(InvalidArgument):
    reason = "command_not_found"
    template = "The command {command!r} does not exist in the machine or is not executable"
    command: str


class BadCwd(InvalidArgument):
    reason = "bad_cwd"
    template = "The working directory {cwd!r} is not a directory in the machine"
    cwd: str


class UnknownUser(InvalidArgument):
    reason = "unknown_user"
    template = "The machine knows no user {user!r}; a numeric uid (or uid:gid) always works"
    user: str


class UnknownSignal(InvalidArgument):
    reason = "unknown_signal"
    template = "There is no signal {signal!r}; use a name such as TERM or a number"
    signal: str


class BadPath(InvalidArgument):
    reason = "bad_path"
    template = "The path {path!r} is not usable: it must be absolute and without NUL"
    path: str


class BadRange(InvalidArgument):
    reason = "bad_range"
    template = "The range is not within the file of {size} bytes"
    size: int


class BadRequest(InvalidArgument):
    """The guest agent could not read a request."""

    reason = "bad_request"
    template = "The request does not fit: {field}"
    field: str


class BadSetting(InvalidArgument):
    """A setting (variable, flag or line of the settings file) is wrong. Raised at start, before anything is touched."""

    reason = "bad_setting"
    template = "{setting}: {problem}"
    setting: str
    problem: str


class ImageCorrupt(InvalidArgument):
    reason = "image_corrupt"
    template = (
        "The image file {path} is damaged ({problem}); "
        "make it anew with `fuse image build --force {image}`, or `fuse image pull --force` if it was pulled"
    )
    image: str
    path: str
    problem: str


class KernelCorrupt(InvalidArgument):
    reason = "kernel_corrupt"
    template = "The kernel file {path} is damaged or no kernel ({problem}); delete it and build it again"
    path: str
    problem: str


class PathTooLong(InvalidArgument):
    """A Unix socket path has at most 107 bytes (unix(7), sun_path)."""

    reason = "path_too_long"
    template = (
        "The path {path} is too long for a Unix socket (at most {limit} bytes); choose a shorter data or run directory"
    )
    path: str
    limit: int


class HostMismatch(InvalidArgument):
    """What was declared of a host is not what it says of itself."""

    reason = "host_mismatch"
    template = "Host {id} says {field} {reported!r}, not {declared!r}; register it as it is"
    id: str
    field: str
    reported: str
    declared: str


class StartupFailed(InvalidArgument):
    """The startup script ended with another status than 0, or was not done in time. Ends the environment."""

    reason = "startup_failed"
    template = "The startup script failed: {problem}"
    problem: str


class DaemonFailed(InvalidArgument):
    """The user's daemon could not be started. Ends the environment."""

    reason = "daemon_failed"
    template = "The daemon of this environment could not be started: {problem}"
    problem: str
