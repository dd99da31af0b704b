"""Errors about images: what is fetched or unpacked is somebody else's, and is refused unless it is as it should be."""

from fusevm.model.errors.base import Error
from fusevm.model.errors.capacity import Unavailable
from fusevm.model.errors.conflict import Conflict
from fusevm.model.errors.missing import NotFound
from fusevm.model.errors.request import InvalidArgument


class DigestMismatch(InvalidArgument):
    """The content is not what its digest says, or not what was demanded."""

    reason = "digest_mismatch"
    template = "{what} has sha256 {found} instead of {wanted}; nothing was kept"
    what: str
    found: str
    wanted: str


class ImageTooLarge(Error):
    reason = "image_too_large"
    code, status = "payload_too_large", 413
    template = "{image} is larger than allowed: {problem}; the limit is the setting --max-image-size"
    image: str
    problem: str


class AddressRefused(InvalidArgument):
    """A download would lead into the host or a private network."""

    reason = "address_refused"
    template = (
        "{url} leads to {address}, which is {kind}; downloads go to public addresses only "
        "unless the setting --artifact-networks allows the network"
    )
    url: str
    address: str
    kind: str


class ArtifactRefused(InvalidArgument):
    """A URL whose content is no root file system or kernel, or cannot be had as it is."""

    reason = "artifact_refused"
    template = "{url} cannot be imported: {problem}"
    url: str
    problem: str


class UploadFailed(Unavailable):
    """An object store does not take a part of a snapshot."""

    reason = "upload_failed"
    template = "Part {part} could not be uploaded: {problem}"
    part: int
    problem: str


class FetchFailed(Unavailable):
    """A registry or a server does not answer, or breaks off."""

    reason = "fetch_failed"
    template = "{what} could not be fetched: {problem}"
    what: str
    problem: str


class BadReference(InvalidArgument):
    reason = "bad_reference"
    template = (
        "{reference!r} is no image reference: {problem}; "
        "write it like debian:12, registry.example/team/tool:1.2 or name@sha256:<64 hex digits>"
    )
    reference: str
    problem: str


class BadRecipe(InvalidArgument):
    reason = "bad_recipe"
    template = "The recipe cannot be built: {path}: {problem}"
    path: str
    problem: str


class ImageRefused(InvalidArgument):
    """What an image holds cannot be taken over safely or exactly."""

    reason = "image_refused"
    template = "{image} is refused: {problem}"
    image: str
    problem: str


class ImageInUse(Conflict):
    reason = "image_in_use"
    template = "Image {image} is used by {users}; delete those first"
    image: str
    users: str


class ImageUnknown(NotFound):
    """The registry says that it has no such image, or has it for other machines only."""

    reason = "image_unknown"
    template = "There is no {reference} to pull: {problem}"
    reference: str
    problem: str
