"""Relative links between documents lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").glob("**/*.md")
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_ELSEWHERE = re.compile(r"[a-z]+:")
_CODE = re.compile(r"```.*?```", re.DOTALL)


def broken_links(page: Path, text: str) -> list[str]:
    """Targets that do not exist; of links within the page, those without an anchor."""
    found = []
    for target in _LINK.findall(_CODE.sub("", text)):
        if _ELSEWHERE.match(target):
            continue
        path, _, anchor = target.partition("#")
        is_there = (page.parent / path).exists() if path else _has_anchor(text, anchor)
        if not is_there:
            found.append(target)
    return found


def _has_anchor(text: str, anchor: str) -> bool:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    return anchor in slugs or f'id="{anchor}"' in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_seen():
    text = "# One title\n[a](errors.md) [b](no.md#x) [c](https://x/y) [d](#one-title) [e](#two)\n```\n[f](no)\n```"
    assert broken_links(ROOT / "docs/page.md", text) == ["no.md#x", "#two"]
