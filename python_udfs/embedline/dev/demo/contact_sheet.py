"""Write queries and their hits as one HTML page with all pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
section { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: 1rem 0; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
h2 img { height: 4rem; vertical-align: middle; background: #fff; border-radius: .3rem; }
ol { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); list-style: none;
     margin: 0; padding: 0; }
figure { margin: 0; text-align: center; }
figure img { background: #fff; border-radius: .3rem; height: 5rem; max-width: 100%; object-fit: contain; padding: .2rem; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Hit:
    """A found picture: a file that a browser shows, its caption and its score."""

    picture: bytes
    caption: str
    score: float


@dataclass(frozen=True)
class Query:
    """Words, or a picture if there is one, and the hits in their order."""

    words: str
    picture: bytes | None
    hits: Sequence[Hit]


def write_sheet(path: Path, title: str, figures: str, queries: Sequence[Query]) -> None:
    """Write the page; `figures` is a line of text below its title."""
    path.parent.mkdir(exist_ok=True)
    sections = "\n".join(map(_section, queries))
    path.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(figures)}</p>\n"
        f"{sections}\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _section(query: Query) -> str:
    words = html.escape(query.words)
    asked = f"“{words}”" if query.picture is None else f"{_image(query.picture, query.words)} {words}"
    hits = "\n".join(
        f"<li><figure>{_image(hit.picture, hit.caption)}"
        f"<figcaption>{html.escape(hit.caption)}<br>{hit.score:.3f}</figcaption></figure></li>"
        for hit in query.hits
    )
    return f"<section>\n<h2>{asked}</h2>\n<ol>\n{hits}\n</ol>\n</section>"


def _image(data: bytes, text: str) -> str:
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
