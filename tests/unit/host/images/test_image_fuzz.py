"""Parsers of what strangers send: layers, documents, references. Whatever comes, the outcome is an image or a refusal.

CI runs a fixed number of mutations of a corpus from a fixed seed; `--fuzz-seconds 300` goes on for that long with
another one, which a failure prints.
"""

import gzip
import io
import itertools
import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator

import pytest

import fuzz_rounds
from fusevm.host.images.file_system import measure_tree, render_script
from fusevm.host.images.oci import Manifest, choose, parse_config, parse_manifest
from fusevm.host.images.reference import parse_reference
from fusevm.host.images.tar_stream import BadTar, TarStream
from fusevm.host.images.tree import BadTree, Tree
from fusevm.host.images.unpack import Allowance, LayerReader, TooLarge
from fusevm.model.errors import BadReference, ImageRefused, ImageUnknown
from image_factory import INDEX, MANIFEST, ImageFiles, describe, entry, folder, hard_link, make_tar, symlink

ROUNDS = 1500
#: One line of a script: a command of ours, and words that are quoted or plain.
_WORD = rb'(?:"(?:[^"\n\r\0]|"")*"|[A-Za-z0-9_@/.-]+)'
_LINE = re.compile(rb"(?:mkdir|cd|symlink|mknod|write|link|rm|sif|ea_set -f|ssv)(?: " + _WORD + rb"){1,3}", re.DOTALL)
_NUMBERED = re.compile(rb"write content/\d+ ")

NAMES = [
    "a",
    "bin/x",
    "../x",
    "a/../../b",
    "/etc/passwd",
    "dev/sda",
    ".wh.a",
    "d/.wh..wh..opq",
    'q"x',
    "x\ny",
    "é" * 80,
]


def corpus() -> list[bytes]:
    """Archives that are good, odd or hostile."""
    good = [folder("./"), folder("d"), entry("d/x", b"1" * 700), symlink("l", "d"), hard_link("h", "d/x")]
    kinds = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    odd = [entry(name, kind=kind, target="d/x") for name, kind in itertools.product(NAMES, kinds)]
    tars = [make_tar(*good), make_tar(*good, form=tarfile.GNU_FORMAT), make_tar(entry("n" * 300, b"x"))]
    tars += [make_tar(*good, one) for one in odd]
    tars.append(make_tar(entry("x", b"x", xattrs={"user.a": b"v" * 300, "security.capability": b"\1\2"})))
    return tars


def mutate(chance: random.Random, data: bytes) -> bytes:
    """Change, cut, repeat or insert something."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(changed) + 1) if changed else 0
        match chance.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at : at + chance.choice((1, 8, 512))]
            case 2:
                changed[at:at] = chance.randbytes(chance.choice((1, 8, 512)))
            case 3:
                changed[at:at] = changed[at : at + 512]
            case 4:
                changed[at : at + 12] = chance.choice((b"77777777777\0", b"\x80" + b"\xff" * 11, b"-1         \0"))
            case _:
                changed[at : at + 4] = chance.choice((b"\0\0\0\0", b"../.", b"\n\r\"'", b"/../"))
    return bytes(changed)


def seal(data: bytes) -> bytes:
    """Make the checksums of headers right again, so that what is behind them is looked at."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    return bytes(blocks)


def rounds(name: str) -> Iterator[random.Random]:
    """A source of chance per round; the seed of a failure is in the test's name for it."""
    return (chance for _seed, chance in fuzz_rounds.rounds(name, ROUNDS))


def apply_layers(layers: list[bytes]) -> Tree:
    """What `unpack` does, without files."""
    tree, allowance, content = Tree(5000), Allowance(8 << 20), itertools.count()
    for layer in layers:
        tree.begin_layer()
        reader = LayerReader(io.BytesIO(layer), allowance)
        stream = TarStream(reader.read)
        for one in stream:
            size = sum(len(piece) for piece in stream.content())
            assert size == one.size
            tree.apply(one, next(content))
        reader.finish()
    return tree


def check(tree: Tree) -> None:
    """A tree that was taken is a tree, and its script says nothing but what we say."""
    for node in tree.nodes():
        assert node.links >= 1
        for key in node.children:
            assert key not in (b"", b".", b"..")
            assert b"/" not in key
            assert len(key) <= 255
    measure_tree(tree)
    depth = 0
    for line in render_script(tree).commands.split(b"\n")[:-1]:
        assert _LINE.fullmatch(line), line
        assert len(line) <= 8000
        assert not line.startswith(b"write ") or _NUMBERED.match(line), line
        depth += (line.startswith(b"cd ") and line != b"cd ..") - (line == b"cd ..")
        assert depth >= 0
    assert depth == 0


def test_layers_become_a_tree_or_are_refused():
    taken, tars = 0, corpus()
    for chance in rounds("layers"):
        layers = [seal(mutate(chance, chance.choice(tars))) for _ in range(chance.randint(1, 3))]
        if chance.random() < 0.3:
            layers[0] = mutate(chance, gzip.compress(layers[0], 1))
        try:
            tree = apply_layers(layers)
        except (BadTar, BadTree, TooLarge):
            continue
        check(tree)
        taken += 1
    assert taken > 10, "the mutations are too wild to try what comes after the headers"


def test_the_corpus_itself_is_taken_or_refused():
    for tar in corpus():
        try:
            check(apply_layers([tar]))
        except (BadTar, BadTree):
            continue


def documents() -> list[bytes]:
    """Manifests, indexes and configurations."""
    files = ImageFiles(make_tar(entry("x", b"")), Env=["A=1"], User="1:2", Cmd=["x"], WorkingDir="/x")
    raw = json.dumps(files.manifest).encode()
    platform = {"architecture": "amd64", "os": "linux"}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [{**describe(raw, MANIFEST), "platform": platform}]}
    return [raw, json.dumps(index).encode(), files.config_bytes]


def read_documents(data: bytes) -> None:
    parsed = parse_manifest(data, "fuzzed")
    if not isinstance(parsed, Manifest):
        chosen = choose(parsed, "fuzzed")
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", chosen.digest)
    else:
        assert all(re.fullmatch(r"[0-9a-f]{64}", part.hex) for part in (parsed.config, *parsed.layers))


def read_config(data: bytes) -> None:
    config = parse_config(data, 1, "fuzzed").config
    assert config.workdir.startswith("/")
    assert ".." not in config.workdir.split("/")
    assert not any("\0" in word for word in (*config.cmd, *config.entrypoint, *config.env.values()))


@pytest.mark.parametrize("read", [read_documents, read_config])
def test_documents_are_understood_or_refused(read: Callable[[bytes], None]):
    parts = documents()
    for chance in rounds(read.__name__):
        data = mutate(chance, chance.choice(parts))
        if chance.random() < 0.1:
            data = data.replace(b"[", b"[" * 5000)
        try:
            read(data)
        except (ImageRefused, ImageUnknown):
            continue


def test_references_are_understood_or_refused():
    texts = ["debian:12", "r.example:5000/team/tool@sha256:" + "a" * 64, "[::1]:1/x", "docker://a/b:c"]
    for chance in rounds("references"):
        text = mutate(chance, chance.choice(texts).encode()).decode(errors="replace")
        try:
            reference = parse_reference(text)
        except BadReference:
            continue
        # What becomes a word of a command is one word, and no option.
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]*", reference.text) or reference.text.startswith("[")
