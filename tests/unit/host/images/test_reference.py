"""What people call an image."""

import pytest

from fusevm.host.images.reference import parse_reference
from fusevm.host.images.store import parse_name
from fusevm.model.errors import BadReference

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full", "name"),
    [
        ("debian", "docker.io/library/debian:latest", "debian:latest"),
        ("debian:12", "docker.io/library/debian:12", "debian:12"),
        ("docker://debian:12", "docker.io/library/debian:12", "debian:12"),
        ("team/tool", "docker.io/team/tool:latest", "team/tool:latest"),
        ("index.docker.io/team/tool:1", "docker.io/team/tool:1", "team/tool:1"),
        ("ghcr.io/a/b/c:V1_x", "ghcr.io/a/b/c:V1_x", "ghcr.io/a/b/c:V1_x"),
        ("localhost/tool", "localhost/tool:latest", "localhost/tool:latest"),
        ("localhost:5000/tool:1", "localhost:5000/tool:1", "localhost:5000/tool:1"),
        (f"tool@{DIGEST}", f"docker.io/library/tool@{DIGEST}", "tool"),
        (f"r.example:1/tool:2@{DIGEST}", f"r.example:1/tool:2@{DIGEST}", "r.example:1/tool:2"),
    ],
)
def test_a_reference_is_understood_as_registries_do(text: str, full: str, name: str):
    reference = parse_reference(text)
    assert (reference.text, reference.name) == (full, name)
    assert parse_name(reference.name) == reference.name
    if not reference.digest:
        assert parse_reference(reference.text) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "UPPER",
        "a//b",
        "a/../b",
        "../etc",
        "/etc/passwd",
        "tool:",
        "tool:a b",
        "tool:-x",
        "tool@sha256:abc",
        f"tool@sha512:{'a' * 64}",
        "--help",
        "tool --insecure",
        "bad_host.example:x/tool",
        "host:5000:6000/tool",
        "x" * 300,
        "a\nb",
        "oci:/etc",
        "dir:/etc",
    ],
)
def test_what_is_no_reference_is_refused(text: str):
    with pytest.raises(BadReference, match="write it like"):
        parse_reference(text)


def test_a_transport_is_only_a_name():
    """What skopeo would read from this host is a repository with a tag to us."""
    assert parse_reference("containers-storage:x").text == "docker.io/library/containers-storage:x"


@pytest.mark.parametrize(
    ("text", "is_near"),
    [
        ("localhost/x", True),
        ("localhost:5000/x", True),
        ("127.0.0.1:5000/x", True),
        ("[::1]:5000/x", True),
        ("10.0.0.1:5000/x", False),
        ("localhost.example/x", False),
        ("debian", False),
    ],
)
def test_a_registry_on_this_host_is_known(text: str, is_near: bool):
    assert parse_reference(text).is_on_loopback is is_near
