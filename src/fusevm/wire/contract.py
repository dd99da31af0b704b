"""Bodies of computer-host's machine API, which the host daemon serves beside its own (docs/machine-api.md).

Names and shapes are the contract's. What has no counterpart there says so. Numbers of 0 and less mean unset.
"""

from typing import Literal

import msgspec

DEFAULT_CPUS = 2
DEFAULT_MEMORY_MIB = 3072
DEFAULT_STORAGE_BYTES = 10 << 30
#: Who commands run as and files belong to.
USER, USER_ID = "node", 1000
#: What paths of files/ops are below.
WORKSPACE = "/home/node/workspace"


class ArtifactBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a machine is made of."""

    kernel_image_url: str
    rootfs_url: str
    #: Not in the contract: what the root file system must be, 64 hex digits.
    rootfs_sha256: str = ""


class LoginWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """Told of every login. Not served."""

    url: str = ""
    bearer_token: str = ""


class GuestConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the guest is set up."""

    hostname: str = ""
    #: Lines of authorized_keys.
    authorized_keys: list[str] = []
    #: Public keys of authorities that sign users' keys.
    trusted_user_ca_keys: list[str] = []
    login_webhook: LoginWebhook | None = None


class CreateContractMachine(msgspec.Struct, frozen=True, kw_only=True):
    """The contract's body of `POST /machines`. Goes without a fence; answered when the guest is ready, or failed."""

    machine_id: str
    artifact: ArtifactBody | None = None
    #: Not in the contract: an image of the host's own, by name or digest, instead of `artifact`.
    image: str = ""
    memory_mib: int = 0
    storage_bytes: int = 0
    user_volume_ids: list[str] = []
    guest_config: GuestConfig = GuestConfig()


class PortBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A port of the guest that the host relays."""

    name: str
    port: int
    #: On the host; absent while there is no relay.
    host_port: int = 0
    protocol: str


class ResizeMachine(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /machines/{id}/resize`. What runs is stopped, and left so."""

    memory_mib: int = 0
    #: Never smaller than it is.
    storage_bytes: int = 0


class Edit(msgspec.Struct, frozen=True, kw_only=True):
    """Replace every occurrence of a text."""

    find: str
    replace: str = ""


class FilesOperation(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /machines/{id}/files/ops`. Paths are relative to the workspace, or absolute within it."""

    operation: Literal[
        "read_text",
        "read_bytes",
        "write_text",
        "write_bytes",
        "remove",
        "list",
        "stat",
        "exists",
        "patch",
        "read_range",
        "write_range",
        "mkdir",
        "move",
        "grep",
    ]
    path: str = ""
    to: str = ""
    content: str | None = None
    content_base64: str | None = None
    #: Octal digits as text, or the number that they stand for.
    mode: str | int = ""
    recursive: bool = False
    offset: int = 0
    #: 0: to the end.
    length: int = 0
    edits: list[Edit] = []
    #: Of `patch`: the whole new content, before the edits.
    set_contents: str | None = None
    pattern: str = ""
    regex: bool = False
    case_insensitive: bool = False
    max_matches: int = 0


class FileItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file or directory; `symlink` and `other` are not in the contract."""

    path: str
    name: str
    type: Literal["file", "directory", "symlink", "other"]
    size_bytes: int = 0
    mode: str = ""


class FileHit(msgspec.Struct, frozen=True, kw_only=True):
    """The first match of a line."""

    path: str
    line: int
    match: str


class FilesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Only what belongs to the operation is there."""

    content: str | msgspec.UnsetType = msgspec.UNSET
    content_base64: str | msgspec.UnsetType = msgspec.UNSET
    entries: list[FileItem] | msgspec.UnsetType = msgspec.UNSET
    stat: FileItem | msgspec.UnsetType = msgspec.UNSET
    exists: bool | msgspec.UnsetType = msgspec.UNSET
    #: Of the content after a patch: 63 bits of its sha256.
    version: int | msgspec.UnsetType = msgspec.UNSET
    matches: list[FileHit] | msgspec.UnsetType = msgspec.UNSET
    #: Not in the contract: there may be more matches.
    truncated: bool | msgspec.UnsetType = msgspec.UNSET


class MountBody(msgspec.Struct, frozen=True, kw_only=True):
    """A mount of object storage. Not served."""

    mount_id: str = ""


class MountList(msgspec.Struct, frozen=True, kw_only=True):
    """There are none."""

    mounts: list[MountBody] = []
