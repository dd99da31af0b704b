"""What an installation consists of: steps as data. Each can be repeated, and says what it does in a line."""

from pathlib import Path

import msgspec

from fusevm.host.vmm.firecracker.pins import Pin


class GetFile(msgspec.Struct, frozen=True, kw_only=True):
    """Have a file of others, with exactly this digest."""

    pin: Pin
    target: Path
    #: A file that was brought here; None: downloaded.
    source: Path | None = None

    def describe(self) -> str:
        return (
            f"{'take ' + str(self.source) if self.source else 'download ' + self.pin.url} (SHA-256 {self.pin.sha256})"
        )


class InstallPackages(msgspec.Struct, frozen=True, kw_only=True):
    """Packages of the distribution, with apt as this machine has it configured."""

    names: tuple[str, ...]

    def describe(self) -> str:
        return f"install with apt: {' '.join(self.names)}"


class UnpackRelease(msgspec.Struct, frozen=True, kw_only=True):
    """The programs `firecracker` and `jailer` of a release archive."""

    archive: Path
    sha256: str
    folder: Path
    version: str

    def describe(self) -> str:
        return f"install firecracker and jailer {self.version} in {self.folder}"


class StoreKernel(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel of Firecracker's machines, into the store of kernels."""

    file: Path
    data: Path

    def describe(self) -> str:
        return f"store the kernel {self.file.name} in {self.data / 'kernels'}"


class FetchKernel(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel of QEMU's machines: of this machine's mirrors, or out of packages that were brought here."""

    data: Path
    packages: tuple[Path, ...] = ()

    def describe(self) -> str:
        origin = ", ".join(path.name for path in self.packages) if self.packages else "this machine's mirrors"
        return f"store Debian's cloud kernel of {origin} in {self.data / 'kernels'}"


class BuildImage(msgspec.Struct, frozen=True, kw_only=True):
    """The base image, by its recipe or from a root file system that was brought here."""

    name: str
    data: Path
    source: Path | None = None

    def describe(self) -> str:
        return f"build the image {self.name} {f'from {self.source}' if self.source else 'from the Debian mirrors'}"


class SweepBuilds(msgspec.Struct, frozen=True, kw_only=True):
    """What killed builds have left in a store."""

    root: Path

    def describe(self) -> str:
        return f"remove what killed builds have left in {self.root}"


class MakeToken(msgspec.Struct, frozen=True, kw_only=True):
    """Key and token of the host daemon."""

    data_root: Path

    def describe(self) -> str:
        return f"make the key and the token of the host daemon in {self.data_root}"


class LinkProgram(msgspec.Struct, frozen=True, kw_only=True):
    """Which `fuse` the services run."""

    link: Path
    target: Path

    def describe(self) -> str:
        return f"point {self.link} at {self.target}"


class WriteFile(msgspec.Struct, frozen=True, kw_only=True):
    """A small file as a whole."""

    path: Path
    text: str
    mode: int = 0o644

    def describe(self) -> str:
        return f"write {self.path} ({self.mode:04o})"


class ReloadSystemd(msgspec.Struct, frozen=True, kw_only=True):
    """Let systemd read its unit files again."""

    def describe(self) -> str:
        return "systemctl daemon-reload"


class Enable(msgspec.Struct, frozen=True, kw_only=True):
    """Start a service with the machine."""

    unit: str

    def describe(self) -> str:
        return f"systemctl enable {self.unit}"


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Start a service; one that runs is started again, its machines run on."""

    unit: str

    def describe(self) -> str:
        return f"systemctl restart {self.unit}"


class AwaitHost(msgspec.Struct, frozen=True, kw_only=True):
    """Until the host daemon answers."""

    socket: Path

    def describe(self) -> str:
        return "wait until the host daemon answers"


class AwaitControl(msgspec.Struct, frozen=True, kw_only=True):
    """Until the control plane answers."""

    url: str

    def describe(self) -> str:
        return f"wait until the control plane answers at {self.url}"


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """Stop a service and do not start it with the machine."""

    unit: str

    def describe(self) -> str:
        return f"systemctl disable --now {self.unit}"


class EndMachines(msgspec.Struct, frozen=True, kw_only=True):
    """End every machine's process, and remove what is theirs in the kernel. The daemon has ended."""

    def describe(self) -> str:
        return "end what runs of machines; remove their networks, rules and control groups"


class RemovePath(msgspec.Struct, frozen=True, kw_only=True):
    """Remove a file, a link or a whole folder."""

    path: Path

    def describe(self) -> str:
        return f"remove {self.path}"


#: What machines are made of and run by.
Part = GetFile | InstallPackages | UnpackRelease | StoreKernel | FetchKernel | BuildImage | SweepBuilds
#: What files and links there are.
Place = MakeToken | LinkProgram | WriteFile | EndMachines | RemovePath
#: What systemd does.
Service = ReloadSystemd | Enable | Start | AwaitHost | AwaitControl | Stop
Step = Part | Place | Service
