"""The mmdebstrap command line and the machine's mirrors, rendered without running anything."""

from pathlib import Path

import msgspec

from fusevm.host.images.apt import Source, parse_sources
from fusevm.host.images.build import inputs_hash
from fusevm.host.images.debian import RECIPES, mirror_lines, mmdebstrap_command

SOURCES = [
    Source(uri="http://mirror.example/debian/", release="bookworm", component="main"),
    Source(uri="http://mirror.example/debian/", release="bookworm", component="non-free"),
    Source(uri="http://mirror.example/debian/", release="bookworm-updates", component="main"),
    Source(uri="http://mirror.example/debian/", release="bookworm-backports", component="main"),
    Source(uri="http://mirror.example/security/", release="bookworm-security", component="main", signed_by="/k.gpg"),
    Source(uri="http://other.example/", release="stable", component="main"),
]


def test_the_mirrors_of_the_machine_are_used_for_the_wanted_suite():
    assert mirror_lines(SOURCES, "bookworm", "trixie") == [
        "deb http://mirror.example/debian/ trixie main",
        "deb http://mirror.example/debian/ trixie-updates main",
        "deb [signed-by=/k.gpg] http://mirror.example/security/ trixie-security main",
    ]


def test_a_machine_that_is_not_debian_has_no_debian_mirrors():
    assert mirror_lines(SOURCES, "", "bookworm") == []


def test_apt_listings_are_read_once_each():
    text = "http://a/|bookworm|main|$(SIGNED_BY)\nhttp://a/|bookworm|main|$(SIGNED_BY)\n||x|\nnonsense\n"
    (source,) = parse_sources(text)
    assert source.line() == "deb http://a/ bookworm main"


def test_the_command_names_suite_target_and_mirrors_last():
    words = mmdebstrap_command(RECIPES["debian-12"], Path("/x/root.tar"), ["deb m bookworm main"], ['Acquire::A "1";'])
    assert words[0] == "mmdebstrap"
    assert words[-3:] == ["bookworm", "/x/root.tar", "deb m bookworm main"]
    assert '--aptopt=Acquire::A "1";' in words


def test_the_inputs_change_with_the_recipe():
    recipe = RECIPES["debian-12"]
    other = msgspec.structs.replace(recipe, packages=(*recipe.packages, "vim"))
    assert inputs_hash(recipe) == inputs_hash(RECIPES["debian-12"])
    assert inputs_hash(recipe) != inputs_hash(other)
