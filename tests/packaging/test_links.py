"""The documents' links lead to files that are there, and the log of experiments is dated."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
INLINE = re.compile(r"\]\(\s*<?([^\s)>]+)>?(?:\s+[\"'][^)]*)?\)")
REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s+<?([^\s>]+)", re.MULTILINE)
TAG = re.compile(r"<(?:img|a)\b[^>]*?\b(?:src|href)=[\"']([^\"']+)[\"']")
FENCE = re.compile(r"^\s*(```|~~~).*?^\s*\1", re.MULTILINE | re.DOTALL)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def targets(text: str) -> list[str]:
    """Return the relative links and images of a Markdown text, without fragments."""
    text = FENCE.sub("", text)
    found = [link for pattern in (INLINE, REFERENCE, TAG) for link in pattern.findall(text)]
    return [
        unquote(link.split("#")[0])
        for link in found
        if not ELSEWHERE.match(link) and not link.startswith("#")
    ]


def broken(document: Path, root: Path) -> list[str]:
    """Return the links of a document that lead to no file or folder below ``root``."""
    places = {
        link: (document.parent / link).resolve() for link in targets(document.read_text("utf-8"))
    }
    return [
        link
        for link, place in places.items()
        if not (place.exists() and place.is_relative_to(root.resolve()))
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(document: Path) -> None:
    assert not broken(document, ROOT)


def test_the_readme_links_its_picture_and_the_log() -> None:
    links = targets((ROOT / "README.md").read_text("utf-8"))
    assert {"docs/images/report.png", "docs/log.md"} <= set(links)


def test_broken_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("x", encoding="utf-8")
    document = tmp_path / "page.md"
    document.write_text(
        "[a](there.md#part) [o](/) [b](https://example.org/x) ![c](gone.png 'title')\n"
        '[d]: lost.md\n<img src="no.png">\n```\n[e](code.md)\n```\n[f](#part)\n',
        encoding="utf-8",
    )
    assert broken(document, tmp_path) == ["/", "gone.png", "lost.md", "no.png"]


def test_the_log_has_dated_sections() -> None:
    text = FENCE.sub("", (ROOT / "docs" / "log.md").read_text("utf-8"))
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings
    for heading in headings:
        day, colon, title = heading.partition(": ")
        assert date.fromisoformat(day) and colon and title.strip(), heading
