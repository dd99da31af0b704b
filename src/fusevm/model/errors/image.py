"""Errors about images: what is fetched or unpacked is somebody else's, and is refused unless it is as it should be."""

from fusevm.model.errors.base import Error
from fusevm.model.errors.capacity import Unavailable
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


class FetchFailed(Unavailable):
    """A registry or a server does not answer, or breaks off."""

    reason = "fetch_failed"
    template = "{what} could not be fetched: {problem}"
    what: str
    problem: str
