"""The project's pages: README.md and docs/, and what is written in them."""

import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(page for page in DOCS.rglob("*.md") if "site" not in page.relative_to(DOCS).parts)]


class Block(NamedTuple):
    """A fenced block: its language, and its text without the indentation of the fence."""

    language: str
    text: str


def name_of(page):
    """Returns a page's path from the root, as the name of a test."""
    return page.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    """Returns the fenced blocks of a page, of some languages or of all."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(), re.DOTALL | re.MULTILINE)
    plain = [Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]
    return [block for block in plain if not languages or block.language in languages]


def prose(page):
    """Returns the text of a page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def inline_codes(page):
    """Returns what stands between single backticks in the text of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(text):
    """Yields the words of every command of a shell block: of each line, and of each part between `&&`."""
    for line in text.splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "&"]
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def anchors(page):
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def table_rows(page, heading):
    """Yields the cells of each row of the first table under a heading."""
    lines = page.read_text().split(f"\n## {heading}\n", 1)[1].splitlines()
    table = itertools.takewhile(
        lambda line: line.startswith("|"), itertools.dropwhile(lambda line: line[:1] != "|", lines)
    )
    for line in itertools.islice(table, 2, None):
        yield [cell.strip() for cell in line.strip("|").split("|")]
