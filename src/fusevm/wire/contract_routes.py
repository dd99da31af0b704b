"""Rows of computer-host's machine API in the host daemon's table. Its create shares a path with Fuse's own."""

from fusevm.model import errors as e
from fusevm.wire import contract, host_api
from fusevm.wire.routes import Payload, Route, Scope

_BOOT = (e.HostFull, e.NoSpace, e.VmmMissing, e.ImageCorrupt, e.CommandFailed, e.Timeout, e.ShuttingDown)

_IMPORT = (e.AddressRefused, e.ArtifactRefused, e.DigestMismatch, e.ImageTooLarge, e.FetchFailed)
_ORDER = (
    *(e.BadField, e.MachineNotFound, e.WrongCluster, e.MachineExists, e.StaleIncarnation, e.StaleAction),
    *(e.OrderExpired, e.WrongState),
)
_FILES = (
    *(e.FileNotFound, e.FileTooLarge, e.IsADirectory, e.NotADirectory, e.DirectoryNotEmpty, e.FileExists, e.BadPath),
    *(e.PermissionDenied, e.NoSpaceInGuest, e.NotSupported, e.BadRequest, e.GuestUnreachable, e.AgentFailure),
)
_MACHINE = "/machines/{id}"
#: JSON with a content: base64 of some 24 MiB, and several times that in memory. What is larger goes in ranges, or
#: through `/guest/files`, streamed.
FILES_LIMIT = 32 << 20
NO_MOUNTS = "guests of this host mount no object storage; copy files with files/ops or the guest's own tools"

CREATE_ROUTES: tuple[Route, ...] = (
    Route(
        method="POST",
        path="/machines",
        name="create_contract_machine",
        summary="Make a machine in computer-host's form; answers when its guest is ready, or with phase `failed`",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        request=contract.CreateContractMachine,
        answer=host_api.MachineAnswer,
        statuses=(201,),
        limit=1 << 20,
        errors=(e.BadField, e.MachineExists, e.ImageNotFound, e.Unimplemented, *_IMPORT, *_BOOT),
    ),
)

CONTRACT_ROUTES: tuple[Route, ...] = (
    Route(
        method="POST",
        path=_MACHINE + "/resize",
        name="resize_machine",
        summary="More memory, or a larger disk and file system. What runs is stopped, and left so",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        request=contract.ResizeMachine,
        answer=host_api.MachineAnswer,
        errors=(*_ORDER, e.HostFull, e.NoSpace, e.Timeout),
    ),
    Route(
        method="POST",
        path=_MACHINE + "/files/ops",
        name="files_ops",
        summary="One operation on the workspace's files, of a machine that runs or rests",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        request=contract.FilesOperation,
        answer=contract.FilesAnswer,
        limit=FILES_LIMIT,
        errors=(*_ORDER, *_FILES, e.HostFull, e.NoSpace, e.BootFailed, e.Timeout),
    ),
    Route(
        method="POST",
        path=_MACHINE + "/exec-relay",
        name="exec_relay",
        summary="Forward a port of the host to the guest's exec daemon (49983), if it runs one. Idempotent",
        scope=Scope.HOSTS,
        answer=host_api.MachineAnswer,
        errors=(*_ORDER, e.HostFull, e.NoSpace, e.PolicyNotEnforceable, e.PublishedPortExists),
    ),
    Route(
        method="GET",
        path=_MACHINE + "/mounts",
        name="list_mounts",
        summary="Mounts of object storage: none",
        scope=Scope.HOSTS,
        answer=contract.MountList,
        errors=_ORDER,
    ),
    Route(
        method="POST",
        path=_MACHINE + "/mounts",
        name="create_mount",
        summary="Mount object storage",
        scope=Scope.HOSTS,
        takes=Payload.JSON,
        errors=_ORDER,
        unimplemented=NO_MOUNTS,
    ),
    Route(
        method="DELETE",
        path=_MACHINE + "/mounts/{mid}",
        name="delete_mount",
        summary="Unmount object storage",
        scope=Scope.HOSTS,
        gives=Payload.NONE,
        statuses=(204,),
        errors=_ORDER,
        unimplemented=NO_MOUNTS,
    ),
)
