"""Facts that one place tells, and that all others ask there."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# The function that tells the state of a vector index, and the files that ask for the validity of unique indexes of sources.
_ASK_INDISVALID = {
    "sql/functions/_index_state.sql",
    "sql/functions/_source_trouble.sql",
    "python_udfs/embedline/pipelines/changed_keys.py",
    "python_udfs/embedline/pipelines/plan.py",
    "python_udfs/embedline/replication/publication.py",
}


def _files_with(word: str) -> set[str]:
    files = [*(_ROOT / "python_udfs").rglob("*.py"), *(_ROOT / "sql").rglob("*.sql")]
    return {path.relative_to(_ROOT).as_posix() for path in files if word in path.read_text(encoding="utf-8")}


def test_the_state_of_a_vector_index_is_told_by_one_function() -> None:
    assert _files_with("indisvalid") == _ASK_INDISVALID


def test_one_module_of_the_tests_knows_generated_names() -> None:
    spelled = re.compile(r"embedline_data\.(?:[a-z]+_|\{[a-z])")
    known = ("generated_names.py", Path(__file__).name)
    files = [path for path in (_ROOT / "tests").rglob("*.py") if path.name not in known]
    assert [path.name for path in files if spelled.search(path.read_text(encoding="utf-8"))] == []
