"""Which modules one changed row passes on its way to its vector, and one search: printed, and bounded.

A reader who follows either has these files to open. `pytest -s` shows the lists.
"""

from __future__ import annotations

import psycopg
import pytest

from support import create_pages, create_pipeline, scalar, settle

_TRACE = """
    CREATE FUNCTION test_modules_passed(statement text) RETURNS text[] LANGUAGE plpython3u AS $python$
        import sys

        passed = {}
        def note(frame, event, argument):
            name = frame.f_globals.get("__name__", "")
            code = frame.f_code
            # The import of a module and the generated code of a dataclass are no step of the way.
            is_step = code.co_name != "<module>" and code.co_filename != "<string>"
            if event == "call" and is_step and name.startswith("embedline."):
                passed.setdefault(name.removeprefix("embedline."), None)
        # Warm: what is imported and prepared once in a session is no part of the way.
        plpy.execute(statement.replace("%", "1"))
        sys.setprofile(note)
        try:
            plpy.execute(statement.replace("%", "2"))
        finally:
            sys.setprofile(None)
        return list(passed)
    $python$
"""


@pytest.fixture
def traced(database: psycopg.Connection) -> psycopg.Connection:
    """Pipeline page over 20 embedded rows, and the function that lists the modules a statement passes."""
    create_pages(database, 20)
    create_pipeline(database, index_method="none")
    settle(database)
    database.execute(_TRACE)
    return database


@pytest.mark.parametrize(
    ("way", "statement", "most"),
    [
        # The trigger is SQL; embed_pending takes the row from there.
        ("a changed row", "SELECT embed_pending(1)", 66),
        ("a search", "SELECT count(*) FROM embedline.search('page', 'lava and ash %', 3)", 22),
    ],
)
def test_the_way_through_the_package_is_short(traced: psycopg.Connection, way: str, statement: str, most: int) -> None:
    traced.execute("UPDATE page SET body = 'about volcanoes' WHERE id IN (1, 2)")
    passed = scalar(traced, "SELECT test_modules_passed(%s)", (statement,))
    print(f"\n{way} passes {len(passed)} modules:", *passed, sep="\n  ")
    assert 3 < len(passed) <= most
