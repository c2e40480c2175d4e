"""Short texts for the benches: what apt's package lists on this machine say of Debian's packages."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_HELPER = "/usr/lib/apt/apt-helper"
_FIELDS = ("Package: ", "Section: ", "Description: ")
_SEED = 1
# Words of a sentence that is taken from a long description; longer ones are paragraphs without a full stop.
_WORDS = range(4, 41)


@dataclass(frozen=True)
class Summaries:
    """Different texts in a fixed order; `origins` counts them by where they came from."""

    texts: list[str]
    origins: dict[str, int]


def summaries(count: int) -> Summaries:
    """Return `count` different texts of apt's package lists.

    Short descriptions come first, then sentences of the long ones, which not every machine has, then variations: a
    package's name with its short description, and the short descriptions of two packages of one section.

    Raises SystemExit if apt has no package lists.
    """
    packages = list(_packages())
    if not packages:
        raise SystemExit("apt has no package lists here; run: apt-get update")
    texts: dict[str, None] = {}
    origins: dict[str, int] = {}
    sources = {
        "short descriptions": (summary for _, _, summary in packages),
        "sentences of long descriptions": _sentences(),
        "names with short descriptions": (f"{name}: {summary}" for name, _, summary in packages),
        "pairs of short descriptions": _pairs(packages),
    }
    for origin, source in sources.items():
        before = len(texts)
        for text in source:
            if len(texts) == count:
                break
            texts.setdefault(text)
        origins[origin] = len(texts) - before
    if len(texts) < count:
        raise SystemExit(f"apt's package lists give {len(texts)} texts here, {count} are needed")
    return Summaries(random.Random(_SEED).sample(list(texts), count), origins)


def _lists(kind: str) -> Iterator[str]:
    """Yield the text of apt's lists of a kind: Packages or Translations."""
    command = ["apt-get", "indextargets", "--format", "$(FILENAME)", f"Created-By: {kind}"]
    files = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    for file in sorted(files):
        yield subprocess.run([_HELPER, "cat-file", file], capture_output=True, text=True, check=True).stdout


def _packages() -> Iterator[tuple[str, str, str]]:
    """Yield name, section and short description of every package."""
    for packages in _lists("Packages"):
        for paragraph in packages.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if line.startswith(_FIELDS))
            if len(fields) == len(_FIELDS):
                yield fields["Package"], fields["Section"], fields["Description"]


def _sentences() -> Iterator[str]:
    """Yield the sentences of the long descriptions in English."""
    for translations in _lists("Translations"):
        for paragraph in re.findall(r"^Description-en: .*\n((?: .*\n)+)", translations, re.MULTILINE):
            for block in re.split(r"^ \.$", paragraph, flags=re.MULTILINE):
                sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z])", " ".join(block.split()))
                yield from (sentence for sentence in sentences if len(sentence.split()) in _WORDS)


def _pairs(packages: list[tuple[str, str, str]]) -> Iterator[str]:
    """Yield pairs of short descriptions: each package with later ones of its section."""
    sections: dict[str, list[str]] = {}
    for _, section, summary in packages:
        sections.setdefault(section, []).append(summary)
    for members in sections.values():
        random.Random(_SEED).shuffle(members)
    for distance in range(1, 100):
        for members in sections.values():
            for place, summary in enumerate(members[:-distance]):
                yield f"{summary}; {members[place + distance]}"
