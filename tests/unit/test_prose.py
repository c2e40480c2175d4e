"""The prose of the repository only gets better: faults are counted by package, and a count may only fall."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from prose import ROOT, Passage, passages, sentences

COUNTS = Path(__file__).with_name("prose_counts.txt")
PACKAGE = ROOT / "python_udfs" / "embedline"


def _files() -> dict[str, list[Path]]:
    """Return the files to read by the name that their counts have: the package, sql, alembic or docs."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).with_suffix("").parts[0], []).append(path)
    found["sql"] = sorted((ROOT / "sql").rglob("*.sql"))
    found["alembic"] = [ROOT / "alembic" / "env.py"]
    found["docs"] = sorted((ROOT / "docs").rglob("*.md"))
    return found


def _faults(name: str, passage: Passage) -> Counter[tuple[str, str]]:
    return Counter(
        {
            (name, "retired"): len(passage.retired()),
            (name, "first-line"): int(passage.bad_first_line()),
            (name, "long-sentence"): len(passage.long_sentences()),
        }
    )


def _actual() -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for name, paths in _files().items():
        for path in paths:
            for passage in passages(path):
                counts += _faults(name, passage)
    return counts


def _allowed() -> Counter[tuple[str, str]]:
    rows = [line.split() for line in COUNTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return Counter({(name, fault): int(count) for name, fault, count in rows})


def test_the_counts_of_faults_in_prose_only_fall() -> None:
    actual, allowed = _actual(), _allowed()
    assert actual - allowed == Counter(), ".venv/bin/python tests/prose_faults.py PATH lists the places"
    if os.environ.get("EMBEDLINE_LOWER_PROSE") == "1":
        head = [line for line in COUNTS.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        rows = [f"{name} {fault} {count}" for (name, fault), count in sorted(actual.items())]
        COUNTS.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
        return
    assert allowed - actual == Counter(), f"lower {COUNTS.name}: EMBEDLINE_LOWER_PROSE=1 pytest {Path(__file__).name}"


def _passage(kind: str, text: str) -> Passage:
    return Passage(kind, Path("example.py"), 1, text)


@pytest.mark.parametrize(
    "text",
    [
        "the chunks of a lane",
        "rows are buried",
        "gives the claimed rows back",
        "one look at the queue",
        "contain an error",
        "the failure is contained",
        "lets a claim go",
        "a row in hand",
        "in another worker's hands",
        "begins anew",
        "nobody waits",
        "Whoever comes first",
        "no connection is to be had",
    ],
)
def test_a_retired_word_is_found_in_every_kind_of_text(text: str) -> None:
    assert [len(_passage(kind, text).retired()) for kind in ("docstring", "comment", "string")] == [1, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "planes",
        "lane_id",
        "a table contains rows",
        "it looks for rows",
        "the look-up",
        "a letter goes",
        "let the workers go on",
        "renew",
        "give it the back-end's name",
    ],
)
def test_an_honest_word_is_not_taken_for_a_retired_one(text: str) -> None:
    assert _passage("comment", text).retired() == []


def test_a_first_line_is_one_line_of_at_most_80_characters() -> None:
    good = "x" * 79 + "."
    assert not _passage("docstring", good).bad_first_line()
    assert not _passage("docstring", f"{good}\n\nMore.").bad_first_line()
    assert _passage("docstring", "x" + good).bad_first_line()
    assert _passage("docstring", "Return the rows\nof a table.").bad_first_line()
    assert _passage("docstring", "Return the rows.\nMore.").bad_first_line()


def test_sentences_end_at_their_marks_and_at_list_items() -> None:
    text = "One, e.g. two. Three:\n- four\n- five 1.5 six.\n\nSeven"
    assert sentences(text) == ["One, e.g two.", "Three", "four", "five 1.5 six.", "Seven"]


def test_a_sentence_of_over_25_words_is_found_across_the_lines_of_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text("# " + "word " * 20 + "\n# " + "word " * 5 + "\nx = 1  # " + "word " * 20 + "\n")
    assert [len(passage.long_sentences()) for passage in passages(path)] == [0, 0]
    path.write_text("# " + "word " * 20 + "\n# " + "word " * 6 + "\n")
    assert [len(passage.long_sentences()) for passage in passages(path)] == [1]


def test_prose_is_read_from_sql(tmp_path: Path) -> None:
    path = tmp_path / "example.sql"
    path.write_text("-- One.\nSELECT 'nobody''s'; -- Two.\nCOMMENT ON FUNCTION f() IS\n  '" + "word " * 26 + "';\n")
    assert [(passage.kind, passage.line) for passage in passages(path)] == [
        ("comment", 1),
        ("comment", 2),
        ("string", 2),
        ("comment", 4),
    ]
    assert [len(passage.long_sentences()) for passage in passages(path)] == [0, 0, 0, 1]
