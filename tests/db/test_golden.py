"""The installed schema and its rights are those of tests/golden, so that a reviewer sees every change of either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from catalogue_text import privileges_text, schema_text
from support import ROOT

GOLDEN = ROOT / "tests" / "golden"


@pytest.mark.parametrize(
    ("file", "text"), [(GOLDEN / "schema.sql", schema_text), (GOLDEN / "privileges.txt", privileges_text)]
)
def test_the_installed_schema_is_the_one_that_was_reviewed(
    database: psycopg.Connection, file: Path, text: Callable[[psycopg.Connection], str]
) -> None:
    found = text(database)
    if os.environ.get("EMBEDLINE_UPDATE_GOLDEN") == "1":
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8"), "if this is meant, run: make golden"
