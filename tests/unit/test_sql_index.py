"""sql/README.md is a complete index of the folder: a newcomer finds every object from there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SQL = Path(__file__).resolve().parents[2] / "sql"
FILES = sorted(str(path.relative_to(SQL)) for path in SQL.rglob("*.sql"))
PACKAGE = SQL.parent / "python_udfs" / "embedline"
_ENTRY = re.compile(r"^\| \[`([^`]+)`\]\(([^)]+)\) \| (.+?) \| (.+?) \|$", re.MULTILINE)
ENTRIES = [match.groups() for match in _ENTRY.finditer((SQL / "README.md").read_text(encoding="utf-8"))]


def test_index_names_every_file_once_and_no_other() -> None:
    assert sorted(link for _, link, _, _ in ENTRIES) == FILES


@pytest.mark.parametrize(("link", "work"), [(link, work) for _, link, _, work in ENTRIES])
def test_index_names_the_python_function_that_the_wrapper_calls(link: str, work: str) -> None:
    text = (SQL / link).read_text(encoding="utf-8")
    called = re.search(r"from embedline import (\w+)\s+(?:return )?\1\.(\w+)\(", text)
    if called is None:
        assert work == "SQL"
        return
    module, function = called.groups()
    assert work == f"`{module}.{function}`"
    assert re.search(rf"^def {function}\(", (PACKAGE / f"{module}.py").read_text(encoding="utf-8"), re.MULTILINE)
