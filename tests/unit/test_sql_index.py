"""sql/README.md is a complete index of the folder: a newcomer finds every object and its work from there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from embedline.dev.sql_index import SQL, SqlObject, render, sql_objects

OBJECTS = list(sql_objects())


def test_the_index_is_that_of_the_files() -> None:
    assert (SQL / "README.md").read_text(encoding="utf-8") == render(), "make golden writes it"


def test_every_file_has_a_purpose() -> None:
    assert [found.path for found in OBJECTS if len(found.purpose) < 10] == []


@pytest.mark.parametrize("found", [found for found in OBJECTS if found.work], ids=lambda found: found.name)
def test_a_wrapper_calls_the_python_function_of_its_own_name(found: SqlObject) -> None:
    assert found.work is not None
    module, function = found.work
    assert function == Path(found.path).stem.removeprefix("_")
    assert callable(getattr(importlib.import_module(f"embedline.{module}"), function))


def test_a_body_in_python_imports_what_does_its_work() -> None:
    without = [found.path for found in OBJECTS if found.work is None]
    assert [path for path in without if "plpython3u" in (SQL / path).read_text(encoding="utf-8")] == []
