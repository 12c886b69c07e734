"""The project's Markdown pages: their links, the anchors of their headings, and their fenced blocks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("bench/*.md"),
        *ROOT.glob("bench/results/**/*.md"),
        *ROOT.glob("deploy/**/*.md"),
        *ROOT.glob("steerserve/bundled/*.md"),
        *ROOT.glob(".github/**/*.md"),
    }
)

_FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*?) -->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_LINK = re.compile(r"(?<!\\)\]\((?P<target>[^()\s]+)\)|^\[[^\]]+\]: (?P<reference>\S+)$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    note: str = ""
    """The comment `<!-- ... -->` in the line before it, if there is one."""

    @property
    def not_run(self) -> str | None:
        """Why it is no example to run, of a note `not run: ...`."""
        return self.note.removeprefix("not run: ") if self.note.startswith("not run: ") else None

    @property
    def serves(self) -> bool:
        """Whether it starts the server that the examples behind it call, of a note `serve`."""
        return self.note == "serve"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _FENCE.finditer(text):
        line = text[: match.start("text")].count("\n")
        found.append(Block(match["language"], match["text"], line, match["note"] or ""))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks and inline code."""
    return re.sub(r"`[^`\n]+`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> Iterator[str]:
    """Targets of the links and pictures of a page."""
    for match in _LINK.finditer(prose(page)):
        yield match["target"] or match["reference"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and mkdocs give to the headings of a page."""
    found: set[str] = set()
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        number = sum(one == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", one) is not None for one in found)
        found.add(slug if not number else f"{slug}-{number}")
    return found
