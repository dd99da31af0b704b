"""Commands about this machine: images, fitness, measurements."""

import json
import shutil
from pathlib import Path

import pytest
from cli_outcome import Fuse

NEEDS_MKE2FS = pytest.mark.skipif(shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin") is None, reason="no mke2fs")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The root file system of a tiny image."""
    root = tmp_path / "tree"
    (root / "bin").mkdir(parents=True)
    (root / "bin/hello").write_text("#!/bin/sh\necho hello\n")
    (root / "bin/hello").chmod(0o755)
    return root


def test_a_machine_without_images_has_an_empty_list(fuse: Fuse, tmp_path: Path) -> None:
    assert fuse("image", "list", "--data", str(tmp_path / "none")).out.split() == [
        "NAME",
        "DIGEST",
        "SIZE",
        "AGE",
        "SOURCE",
    ]
    done = fuse("image", "list", "--data", str(tmp_path / "none"), "-o", "json")
    assert (done.code, json.loads(done.out)) == (0, [])
    assert not (tmp_path / "none").exists(), "looking makes nothing"


@NEEDS_MKE2FS
def test_an_image_is_built_from_a_folder_and_listed(fuse: Fuse, tmp_path: Path, tree: Path) -> None:
    data = str(tmp_path / "data")
    built = fuse("image", "build", "tiny", "--from", str(tree), "--data", data)
    assert built.code == 0, built.err
    digest = built.out.strip()
    assert digest.startswith("sha256:")
    listed = json.loads(fuse("image", "list", "--data", data, "-o", "json").out)
    assert [(one["names"], one["digest"], one["source"]) for one in listed] == [(["tiny"], digest, str(tree))]
    assert listed[0]["size_bytes"] > 0
    row = fuse("image", "list", "--data", data).out.splitlines()[1]
    assert row.split()[:2] == ["tiny", digest.removeprefix("sha256:")[:12]]


@NEEDS_MKE2FS
def test_an_image_is_built_from_a_tar(fuse: Fuse, tmp_path: Path, tree: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "rootfs"), "tar", tree)
    done = fuse("image", "build", "tiny", "--from", archive, "--data", str(tmp_path / "data"), "-o", "json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["names"] == ["tiny"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Bad Name", "--from", "."], "is no image name"),
        (["tiny", "--from", "/no/such"], "does not exist"),
        (["no-recipe"], "no-recipe"),
    ],
)
def test_what_cannot_be_built_is_wrong_usage(fuse: Fuse, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = fuse("image", "build", *arguments, "--data", str(tmp_path / "data"))
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert "Traceback" not in done.err


def test_the_doctors_exit_code_is_its_verdict(fuse: Fuse, tmp_path: Path) -> None:
    done = fuse("doctor", "--data", str(tmp_path / "data"), "-o", "json")
    told = json.loads(done.out)
    assert done.code == ["fit", "degraded", "unfit"].index(told["verdict"])
    levels = {check["level"] for check in told["checks"]}
    assert levels <= {"ok", "degraded", "unfit"}
    assert (told["verdict"] == "unfit") == ("unfit" in levels)
    assert all(check["remedy"] for check in told["checks"] if check["level"] != "ok")
    assert not (tmp_path / "data").exists(), "it changes nothing"


def test_the_doctor_speaks_to_people(fuse: Fuse, tmp_path: Path) -> None:
    done = fuse("doctor", "--data", str(tmp_path / "data"))
    assert done.code in (0, 1, 2)
    endings = ("This machine is fit.", "Machines run here, but see above.", "Machines cannot run here; see above.")
    assert done.out.splitlines()[-1] == endings[done.code]
    assert "\x1b" not in done.out


def test_the_doctor_refuses_bad_settings(fuse: Fuse) -> None:
    done = fuse("doctor", "--max-machines", "0")
    assert done.code == 2
    assert "--max-machines" in done.err


def test_bench_explains_itself_without_a_machine(fuse: Fuse) -> None:
    done = fuse("bench", "--help")
    assert done.code == 0
    for option in ("--boots", "--rounds", "--mib", "--image", "--json", "--output"):
        assert option in done.out
