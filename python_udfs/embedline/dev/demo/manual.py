"""Read the PostgreSQL manual: its pages, and the terms of its index.

Each term has the pages that answer it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lxml import html

_DOC_ROOT = Path("/usr/share/doc")
_INDEX_PAGE = "bookindex.html"
_INDEX_LINK = "indexterm"


class ManualNotFound(Exception):
    """The HTML pages of the PostgreSQL manual are not on this machine."""


@dataclass(frozen=True)
class Page:
    """One HTML page of the manual as plain text; `name` is its file name."""

    name: str
    title: str
    body: str


def manual_folder(major: int, root: Path = _DOC_ROOT) -> Path:
    """Return the folder of the manual's HTML pages.

    The server's major version is preferred if its manual is installed. Raises ManualNotFound with the package to
    install.
    """
    found = {
        int(path.parts[-3].rpartition("-")[2]): path.parent
        for path in root.glob(f"postgresql-doc-*/html/{_INDEX_PAGE}")
        if path.parts[-3].rpartition("-")[2].isdecimal()
    }
    if not found:
        raise ManualNotFound(
            f"there is no manual under {root}/postgresql-doc-*/html; run: apt-get install postgresql-doc-{major}"
        )
    return found[major] if major in found else found[max(found)]


def read_pages(folder: Path) -> Iterator[Page]:
    """Yield every page except the index.

    The index's terms would answer every search with themselves.
    """
    for path in sorted(folder.glob("*.html")):
        if path.name != _INDEX_PAGE:
            yield _read_page(path)


def _read_page(path: Path) -> Page:
    root = _parse(path)
    body = root.find("body")
    if body is None:
        raise ValueError(f"{path} has no body")
    for navigation in body.xpath('./div[@class="navheader" or @class="navfooter"]'):
        navigation.drop_tree()
    return Page(
        path.name, collapse_spaces(root.findtext(".//title") or path.name), collapse_spaces(body.text_content())
    )


def collapse_spaces(text: str) -> str:
    """Return text with single spaces and trimmed lines.

    Empty lines stay, because chunks are cut at them first.
    """
    return "\n".join(" ".join(line.split()) for line in text.splitlines()).strip()


def read_index_terms(folder: Path) -> dict[str, frozenset[str]]:
    """Return the manual's own index: term to the names of the pages that it points to.

    A nested term is joined with its parent: "subtransactions" under "transaction" is "transaction subtransactions".
    Terms that only say "see" another one point to no page and are left out.
    """
    terms: dict[str, set[str]] = {}
    for entries in _parse(folder / _INDEX_PAGE).xpath('//div[@class="indexdiv"]/dl'):
        _collect(entries, "", terms)
    return {term: frozenset(pages) for term, pages in terms.items()}


def _collect(entries: html.HtmlElement, parent: str, terms: dict[str, set[str]]) -> None:
    term = parent
    for element in entries:
        if element.tag == "dt":
            text, pages = _index_entry(element)
            term = f"{parent} {text}".strip()
            if pages:
                terms.setdefault(term, set()).update(pages)
        elif element.tag == "dd":
            for nested in element.findall("dl"):
                _collect(nested, term, terms)


def _index_entry(entry: html.HtmlElement) -> tuple[str, set[str]]:
    """Return the text before an entry's first link, and the pages of all its links."""
    text, pages = entry.text or "", set()
    for child in entry:
        if child.tag == "a" and child.get("class") == _INDEX_LINK:
            pages.add((child.get("href") or "").partition("#")[0])
        elif not pages:
            text += child.text_content() + (child.tail or "")
    return " ".join(text.split()).rstrip(",").rstrip(), pages


def _parse(path: Path) -> html.HtmlElement:
    root: html.HtmlElement = html.parse(str(path)).getroot()
    return root
