"""What messages, docstrings and pages refer to exists: files, sections and anchors."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PAGE = r"(?:[\w./-]*/)?[\w-]+\.md"
# docs/how-to/remove.md, “Uninstall”; README.md#limits; docs/dba.md.
_MENTION = re.compile(rf"(?<![\w/.-])({_PAGE})(?:#([\w-]+)|,? (?:section )?[“\"]([^”\"\n]+)[”\"])?")
_SOURCES = (".py", ".sql", ".toml", ".ini", ".mako")


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def _headings(path: Path) -> list[str]:
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"[`*]", "", heading).strip() for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _problem(page: Path, anchor: str | None, section: str | None) -> str | None:
    if not page.exists():
        return f"there is no {page.relative_to(ROOT)}"
    if anchor and anchor not in map(_anchor, _headings(page)):
        return f"{page.relative_to(ROOT)} has no anchor #{anchor}"
    if section and section not in _headings(page):
        return f"{page.relative_to(ROOT)} has no section “{section}”"
    return None


def _dangling_links(path: Path) -> Iterator[str]:
    for target in _LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        if problem := _problem((path.parent / name).resolve() if name else path, anchor or None, None):
            yield f"{path.relative_to(ROOT)}: {problem}"


def _dangling_mentions(path: Path, text: str) -> Iterator[str]:
    for name, anchor, section in _MENTION.findall(text):
        # A page beside the file, from the top of the checkout, or from a folder with a page that a module writes.
        places = (path.parent / name, ROOT / name, ROOT / "sql" / name, ROOT / "docs" / "reference" / name)
        page = next((place for place in places if place.exists()), ROOT / name)
        if problem := _problem(page, anchor or None, section or None):
            yield f"{path.relative_to(ROOT)}: {problem}"


def test_every_link_of_a_page_leads_somewhere() -> None:
    pages = [path for path in _files() if path.suffix == ".md"]
    assert len(pages) > 8
    assert [problem for path in pages for problem in _dangling_links(path)] == []


def test_every_page_and_section_that_is_named_exists() -> None:
    sources = [path for path in _files() if path.suffix in _SOURCES or path.name == "Makefile"]
    # Texts of tests are made up.
    sources = [path for path in sources if "tests" not in path.relative_to(ROOT).parts]
    pages = [path for path in _files() if path.suffix == ".md"]
    found = [
        problem for path in sources + pages for problem in _dangling_mentions(path, path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("see README.md, “Against any other server”", "has no section “Against any other server”"),
        ("see README.md#against-any-other-server", "has no anchor"),
        ("see docs/nowhere.md.", "there is no docs/nowhere.md"),
        ("see README.md, “Try it”, and docs/dba.md", None),
    ],
)
def test_a_reference_that_dangles_is_seen(text: str, problem: str | None) -> None:
    found = list(_dangling_mentions(ROOT / "Makefile", text))
    assert (problem is None and not found) or (problem is not None and problem in found[0])
