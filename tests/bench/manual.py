"""Real text for the benches: sentences and pages of the PostgreSQL manual, which the set-up installs."""

from __future__ import annotations

import html
import random
import re
from pathlib import Path

_MANUAL = Path("/usr/share/doc")
_WORDS = range(8, 31)
_BLOCK = re.compile(r"<(h[1-6]|p|pre)\b[^>]*>(.*?)</\1>", re.DOTALL)


def sentences(count: int | None = None) -> list[str]:
    """Return `count` different sentences of the manual, in an order that is the same every time.

    Without a count they are all, sorted.
    """
    found: set[str] = set()
    for page in sorted(_MANUAL.glob("postgresql-doc-*/html/*.html")):
        markup = page.read_text(errors="replace")
        for paragraph in re.findall(r"<p>(.*?)</p>", markup, re.DOTALL):
            text = " ".join(_plain(paragraph).split())
            found.update(s for s in re.split(r"(?<=[.?!])\s+(?=[A-Z])", text) if len(s.split()) in _WORDS)
    if count is None:
        return sorted(found)
    if len(found) < count:
        raise SystemExit(
            f"the manual has {len(found)} sentences here, {count} are needed; is postgresql-doc installed?"
        )
    return random.Random(count).sample(sorted(found), count)


def pages() -> list[str]:
    """Return the manual's pages as Markdown, in the order of their names.

    They have headings, paragraphs and code.
    """
    return [
        "\n\n".join(_block(tag, markup) for tag, markup in _BLOCK.findall(page.read_text(errors="replace")))
        for page in sorted(_MANUAL.glob("postgresql-doc-*/html/*.html"))
    ]


def _block(tag: str, markup: str) -> str:
    if tag == "pre":
        return f"```\n{_plain(markup).strip()}\n```"
    text = " ".join(_plain(markup).split())
    return text if tag == "p" else f"{'#' * int(tag[1])} {text}"


def _plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", markup))
