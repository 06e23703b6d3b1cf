"""The pages tell the truth about the tree: links, files, functions, the public API; and the site builds."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from helpers.documents import DOCS, PAGES, README, ROOT, anchors, blocks, inline_codes, name_of, prose, table_rows

import gemma_tune
from gemma_tune.cli.main import VERBS

DESIGN = DOCS / "design.md"
OF_THE_TREE = re.compile(r"(gemma_tune|tests|configs|benchmarks|docs|notebooks|\.ci)/[\w./-]*")
MADE_BY_COMMANDS = {"docs/site"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_folders_between_backticks_exist(page):
    paths = {code for code in inline_codes(page) if OF_THE_TREE.fullmatch(code)} - MADE_BY_COMMANDS
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def defined_names(path):
    """Returns the functions and classes of a module, methods as `Class.method`."""
    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
    return names


def test_the_followed_run_names_functions_that_are_there():
    rows = list(table_rows(DESIGN, "One run, function by function"))
    assert len(rows) >= 20
    for number, (position, function, path, _) in enumerate(rows, 1):
        assert int(position) == number
        assert function.strip("`") in defined_names(path.strip("`")), (function, path)


def test_where_is_names_a_file_for_twenty_behaviours():
    rows = list(table_rows(DESIGN, "Where is …?"))
    assert len(rows) >= 20
    assert all((ROOT / path.strip("`")).is_file() for _, path in rows)


def folders():
    """Returns the package's folders, two levels deep, as paths from it."""
    package = ROOT / "gemma_tune"
    found = [path for path in (*package.glob("*"), *package.glob("*/*")) if path.is_dir()]
    return {path.relative_to(package).as_posix() for path in found if path.name != "__pycache__"}


def test_the_tree_is_the_real_one():
    (tree,) = [block.text for block in blocks(DESIGN, "text") if block.text.startswith("gemma_tune/\n")]
    shown, parent = set(), ""
    for indent, name in re.findall(r"^( +)(\w+)/", tree, re.MULTILINE):
        parent = name if len(indent) == 2 else parent
        shown.add(name if len(indent) == 2 else f"{parent}/{name}")
    assert shown == folders()
    for name in re.findall(r"^ +(\w+\.py)", tree, re.MULTILINE):
        assert (ROOT / "gemma_tune" / name).exists()


def test_the_picture_of_the_house_has_all_its_rooms():
    picture = (DOCS / "images/house.svg").read_text()
    assert set(re.findall(r">(\w+)/<", picture)) == {name for name in folders() if "/" not in name}
    for name in re.findall(r"\b\w+\.py\b", picture):
        assert (ROOT / "gemma_tune" / name).exists()


def test_all_pages_are_in_the_navigation():
    nav = tomllib.loads((DOCS / "zensical.toml").read_text())["project"]["nav"]
    listed = [page for group in nav for entries in group.values() for entry in entries for page in entry.values()]
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.relative_to(DOCS).as_posix() for page in PAGES if page != README}


def test_the_command_line_page_has_all_verbs():
    text = (DOCS / "reference/command_line.md").read_text().split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(VERBS)


def test_the_reference_has_the_whole_public_api():
    listed = {}
    for page in ("python_api.md", "settings.md"):
        for identifier in re.findall(r"^::: (\S+)$", (DOCS / "reference" / page).read_text(), re.MULTILINE):
            module, _, name = identifier.rpartition(".")
            listed[name] = getattr(importlib.import_module(module), name)
    public = {name: getattr(gemma_tune, name) for name in gemma_tune.__all__ if name != "__version__"}
    assert {name: value for name, value in listed.items() if name in public} == public


class Links(HTMLParser):
    """Collects what a page of the site links to and loads, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        loads = tag == "link" and values.get("rel") in ("stylesheet", "icon")
        self.loaded += [values[name] for name in ("src", *(["href"] if loads else [])) if values.get(name)]


@pytest.mark.slow  # CI installs what it needs before its slow tests.
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("zensical", reason="pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings_handlers", reason="pip install -e '.[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("site", ".cache"))
    (tmp_path / "gemma_tune").symlink_to(ROOT / "gemma_tune")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", "docs/zensical.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and "arning" not in printed and "griffe:" not in printed, printed[-4000:]
    site = tmp_path / "docs/site"
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) == len(PAGES) - 1
    for page, links in pages.items():
        for link in [*links.links, *links.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link not in links.loaded, f"{page} loads {link}"
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page}: {link} leads nowhere"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{page}: {link} has no such anchor"
