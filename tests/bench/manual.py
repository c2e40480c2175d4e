"""Real text for the benches: sentences of the PostgreSQL manual, which the set-up installs."""

from __future__ import annotations

import html
import random
import re
from pathlib import Path

_MANUAL = Path("/usr/share/doc")
_WORDS = range(8, 31)


def sentences(count: int | None = None) -> list[str]:
    """Return `count` different sentences of the manual, in an order that is the same every time.

    Without a count they are all, sorted.
    """
    found: set[str] = set()
    for page in sorted(_MANUAL.glob("postgresql-doc-*/html/*.html")):
        markup = page.read_text(errors="replace")
        for paragraph in re.findall(r"<p>(.*?)</p>", markup, re.DOTALL):
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", paragraph)).split())
            found.update(s for s in re.split(r"(?<=[.?!])\s+(?=[A-Z])", text) if len(s.split()) in _WORDS)
    if count is None:
        return sorted(found)
    if len(found) < count:
        raise SystemExit(
            f"the manual has {len(found)} sentences here, {count} are needed; is postgresql-doc installed?"
        )
    return random.Random(count).sample(sorted(found), count)
