"""Split Markdown at its blocks; each chunk carries the headings above it."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedline.chunking.chunk import OnPiece, Span, closed_spans
from embedline.chunking.measure import Measure
from embedline.chunking.measured import Room, cut_to
from embedline.chunking.recursive import pieces, split_piece, split_recursively, within

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

_SEPARATOR = " > "
_LINE_END = re.compile(r"\r\n?|\n")
# Characters parsed at a time. A parse keeps about 2 kB for each short block.
_WINDOW_CHARACTERS = 200_000
# Longest heading in characters. A longer one is some other text after a #.
_LONGEST_TITLE = 300
# Most spaces before a heading; more make it code.
_DEEPEST_INDENT = 3
# YAML before the document, because CommonMark would read its last line as a heading underlined with ---.
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(?=[\w-]+[ \t]*:).*?^(?:---|\.\.\.)[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# The room beside headings changes in steps of this share, so that a longer heading does not move every chunk.
_STEPS = 16


@dataclass(frozen=True)
class Heading:
    """A heading: the offset of its line, and the titles down to it.

    The titles start with the outermost heading.
    """

    start: int
    path: tuple[str, ...]


def markdown_split(measure: Measure, text: str, room: Room, on_piece: OnPiece) -> Sequence[tuple[Span, str]]:
    """Split Markdown at its own boundaries.

    A chunk's prefix is the path of the headings that it lies under.
    """
    from semantic_text_splitter import MarkdownSplitter

    headings = list(heading_paths(text, on_piece))
    prefixes = _prefixes(measure, headings, room.prefix_capacity)
    largest = max(measure.sizes(list(prefixes.values())), default=0)
    step = max(room.prefix_capacity // _STEPS, 1)
    capacity = room.capacity - min(-(-largest // step) * step, room.prefix_capacity)
    splitter = measure.splitter(MarkdownSplitter, capacity, room.overlap * capacity // room.capacity)

    def plainly(piece: str, capacity: int) -> list[tuple[int, str]]:
        spans = split_recursively(measure, piece, capacity, 0, on_piece)
        return [(start, piece[start:end]) for start, end in spans]

    found: list[Span] = []
    for start, piece in pieces(text, capacity):
        parts = split_piece(splitter, piece, lambda piece: plainly(piece, capacity))
        found += [(start + at, start + at + len(content)) for at, content in parts]
        on_piece()
    found = within(measure, text, found, capacity)
    starts = [heading.start for heading in headings]
    return [(span, prefixes[_path_above(text, span, headings, starts)]) for span in closed_spans(text, found)]


def heading_paths(text: str, on_piece: OnPiece) -> Iterator[Heading]:
    """Yield the headings of a document in order.

    Headings within a quotation or a list belong to that block and are left out.
    """
    path: list[tuple[int, str]] = []
    for start, level, title in _headings(text, on_piece):
        while path and path[-1][0] >= level:
            path.pop()
        path.append((level, title))
        yield Heading(start, tuple(title for _, title in path))


def _headings(text: str, on_piece: OnPiece) -> Iterator[tuple[int, int, str]]:
    """Yield (offset, level, title), parsing window by window.

    A block of the outermost level that is followed by another one is whole for certain. So the last block of
    a window begins the next. A block that fills its window is read again in one twice as long.
    """
    from markdown_it import MarkdownIt

    # Inline markup of the whole document would take most of the time, so only titles have theirs parsed.
    blocks, titles = MarkdownIt("commonmark").disable("inline"), MarkdownIt("commonmark")
    matter = _FRONT_MATTER.match(text)
    start, length = matter.end() if matter else 0, _WINDOW_CHARACTERS
    while start < len(text):
        window = text[start : start + length]
        at_end = start + length >= len(text)
        if not at_end:
            # A window must not tear a line end in two.
            window = window.removesuffix("\r")
        lines = [0, *(match.end() for match in _LINE_END.finditer(window))]
        tokens = blocks.parse(window)
        opening = [
            token.map[0] for token in tokens if token.level == 0 and token.map is not None and token.nesting >= 0
        ]
        whole = len(lines) if at_end else (opening[-1] if opening else 0)
        for token, inline in itertools.pairwise(tokens):
            if token.type == "heading_open" and token.level == 0 and token.map and token.map[0] < whole:
                yield start + lines[token.map[0]], int(token.tag[1:]), _title(titles, inline)
        on_piece()
        if at_end:
            return
        if whole == 0:
            length *= 2
        else:
            start, length = start + lines[whole], _WINDOW_CHARACTERS


def _title(parser: MarkdownIt, inline: Token) -> str:
    """Return a heading's text without its markup."""
    if len(inline.content) > _LONGEST_TITLE:
        return " ".join(inline.content[:_LONGEST_TITLE].split())
    tokens = parser.parseInline(inline.content)[0].children or []
    return " ".join("".join(token.content or " " * (token.type == "softbreak") for token in tokens).split())


def _prefixes(measure: Measure, headings: Sequence[Heading], capacity: int) -> dict[tuple[str, ...], str]:
    """Return the prefix of each path that a chunk may have.

    It holds the innermost headings that fit into `capacity`.
    """
    paths = {path[:n] for path in (heading.path for heading in headings) for n in range(len(path) + 1)} | {()}
    longest = sorted(paths)
    prefixes: dict[tuple[str, ...], str] = {}
    sizes = measure.sizes([_written(path) for path in longest])
    for path, size in zip(longest, sizes, strict=True):
        kept = path
        while size > capacity and len(kept) > 1:
            kept = kept[1:]
            size = measure.sizes([_written(kept)])[0]
        prefixes[path] = _written(kept) if size <= capacity else cut_to(measure, _written(kept), capacity)[0]
    return prefixes


def _written(path: tuple[str, ...]) -> str:
    return _SEPARATOR.join(path) + "\n\n" if path else ""


def _path_above(text: str, span: Span, headings: Sequence[Heading], starts: Sequence[int]) -> tuple[str, ...]:
    """Return the path of the headings above a span.

    A heading that begins the span is left out, because the chunk's text has it.
    """
    content = text[span[0] : span[1]]
    first = span[1] - len(content.lstrip())
    index = bisect.bisect_right(starts, first) - 1
    if index < 0:
        return ()
    heading = headings[index]
    begins = first - heading.start <= _DEEPEST_INDENT and text[heading.start : first].strip() == ""
    return heading.path[:-1] if begins else heading.path
