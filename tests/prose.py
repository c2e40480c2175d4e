"""Read the prose out of the repository: docstrings, comments and strings, with their sentences."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Words of the glossary's retired list. "look" is retired as a noun, "contain" as a word for catching an error.
RETIRED = {
    "lane": r"\blanes?\b",
    "bury": r"\b(?:bury|buries|buried|burying|burial)\b",
    "give back": r"\bg(?:ive|ives|iven|ave|iving)\s+(?:[\w']+\s+){0,3}?back\b(?!-)",
    "look": r"\b(?:an?|the|this|one|each|every|another|its|first|second|next|last|per|such|further)\s+looks?\b"
    r"(?!-|\s+(?:like|for)\b)",
    "contain": r"\bcontain(?:s|ed|ing)?\s+(?:an?\s+|the\s+|its\s+|this\s+|such\s+)?(?:errors?|failures?|faults?|troubles?)\b"
    r"|\b(?:errors?|failures?|faults?|troubles?)\s+(?:is|are|was|were|be|being)\s+contained\b",
    "let go": r"\blet(?:s|ting)?\s+(?:[\w']+\s+){0,2}?go\b(?!\s+on\b)",
    "in hand": r"\bin\s+(?:[\w']+\s+){0,2}?hands?\b",
    "anew": r"\banew\b",
    "nobody": r"(?<!\A)\bnobody\b|\bnobody\b(?!\Z)",  # a string of its own is the operating system's user
    "whoever": r"\bwhoever\b",
    "to be had": r"\bto be had\b",
}
_RETIRED = re.compile("|".join(f"(?:{pattern})" for pattern in RETIRED.values()), re.IGNORECASE)
LONGEST_FIRST_LINE = 80
LONGEST_SENTENCE = 25

_TOOL_COMMENT = re.compile(r"#\s*(?:noqa|type:|pragma|ruff:|fmt:|mypy:|!)")
_TRAILING_TOOL_COMMENT = re.compile(r"#\s*(?:noqa|type: ignore).*$")
# A sentence ends at its mark; a list item, a table row and a line before an indented example end one, too.
_SENTENCE_END = re.compile(
    r"(?<=[.!?])[\"')\]”`]*\s+|(?<=[.!?][\"')\]”`])\s+|\n\s*\n|\n\s*(?:[-*]|\d+\.)\s+|:(?=\s*\n)|\n {4,}"
)
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|cf|vs|etc|approx|no)\.", re.IGNORECASE)


@dataclass(frozen=True)
class Passage:
    """One docstring, comment or string: its kind ("docstring", "comment", "string"), file, first line and text."""

    kind: str
    path: Path
    line: int
    text: str

    def retired(self) -> list[str]:
        """Return the retired words in the passage."""
        return [found.group() for found in _RETIRED.finditer(self.text)]

    def bad_first_line(self) -> bool:
        """Return True if it is a docstring whose first sentence is over 80 characters or runs over its line."""
        if self.kind != "docstring":
            return False
        first, *rest = self.text.strip().split("\n")
        return len(first) > LONGEST_FIRST_LINE or (bool(rest) and rest[0].strip() != "") or first[-1:] not in ".?!"

    def long_sentences(self) -> list[str]:
        """Return the sentences of over 25 words of a docstring or comment."""
        if self.kind == "string":
            return []
        return [found for found in sentences(self.text) if len(words(found)) > LONGEST_SENTENCE]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text; an indented example, a list item and a heading count as sentences of their own."""
    text = _ABBREVIATION.sub(r"\1", text)
    return [" ".join(part.split()) for part in _SENTENCE_END.split(text) if part and part.strip()]


def words(sentence: str) -> list[str]:
    """Return the words of a sentence: whatever stands between spaces and has a letter or a digit."""
    return [word for word in sentence.split() if re.search(r"\w", word)]


def passages(path: Path) -> list[Passage]:
    """Return the prose of a Python, SQL or Markdown file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [*_python_comments(path, text), *_python_strings(path, text)]
    if path.suffix == ".sql":
        return [*_sql_comments(path, text), *_sql_strings(path, text)]
    return [Passage("string", path, number, line) for number, line in enumerate(text.splitlines(), 1)]


def _python_comments(path: Path, text: str) -> Iterator[Passage]:
    found = [
        (token.start[0], token.start[1], token.line[: token.start[1]].strip() == "", token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and not _TOOL_COMMENT.match(token.string)
    ]
    yield from _blocks(path, [(*place, string.lstrip("#")) for *place, string in found])


def _sql_comments(path: Path, text: str) -> Iterator[Passage]:
    found = [
        (number, match.start(), line[: match.start()].strip() == "", match.group(1))
        for number, line in enumerate(text.splitlines(), 1)
        if (match := re.search(r"--(.*)$", line))
    ]
    yield from _blocks(path, found)


def _blocks(path: Path, comments: list[tuple[int, int, bool, str]]) -> Iterator[Passage]:
    """Join comments that stand alone on successive lines at one indentation."""
    block: list[str] = []
    start = at = column = -1
    for line, indent, alone, text in comments:
        text = _TRAILING_TOOL_COMMENT.sub("", text)
        if not (block and alone and line == at + 1 and indent == column):
            if block:
                yield Passage("comment", path, start, "\n".join(block))
            block, start = [], line
        block.append(text)
        at, column = (line, indent) if alone else (-1, -1)
    if block:
        yield Passage("comment", path, start, "\n".join(block))


def _python_strings(path: Path, text: str) -> Iterator[Passage]:
    nodes = list(ast.walk(ast.parse(text)))
    docstrings = set()
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.add(first.value)
                yield Passage("docstring", path, first.lineno, ast.get_docstring(node) or "")
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield Passage("string", path, node.lineno, node.value)
            for number, line in enumerate(node.value.splitlines()):
                if comment := re.match(r"\s*-- (.*)$", line):
                    yield Passage("comment", path, node.lineno + number, comment.group(1))


def _sql_strings(path: Path, text: str) -> Iterator[Passage]:
    for match in re.finditer(r"'((?:[^']|'')*)'", re.sub(r"--.*", "", text)):
        kind = "comment" if re.search(r"COMMENT ON [^;']*IS\s*$", text[: text.find(match.group())]) else "string"
        yield Passage(kind, path, text[: text.find(match.group())].count("\n") + 1, match.group(1).replace("''", "'"))
