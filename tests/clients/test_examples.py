"""The example of each client's page prints what the page says, and has under 30 lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from conftest import MakeRole
from support import ROOT

_HOW_TO = ROOT / "docs" / "how-to"
_PAGES = ("use-langchain", "use-llamaindex", "use-sqlalchemy", "use-django", "use-mcp")
# The page's program logs in as a role in embedline_reader.
_FOR_READERS = ("use-mcp",)
_LINES = 30
_SETUP = re.compile(r"^<!-- run\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
_EXAMPLE = re.compile(r"^```python\n((?:(?!```)[^\n]*\n)+)```\n\n```text\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", _PAGES)
def test_an_example_prints_what_its_page_says(
    page: str,
    database: psycopg.Connection,
    database_dsn: str,
    make_role: MakeRole,
    role_passwords: dict[str, str],
    tmp_path: Path,
) -> None:
    text = (_HOW_TO / f"{page}.md").read_text(encoding="utf-8")
    for statements in _SETUP.findall(text):
        database.execute(statements.encode())
    if page in _FOR_READERS:
        role = make_role("embedline_reader")
        database.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}".encode())
        database_dsn = conninfo.make_conninfo(database_dsn, user=role, password=role_passwords[role])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    examples = _EXAMPLE.findall(text)
    assert examples
    for program, printed in examples:
        assert len(program.splitlines()) < _LINES
        script = tmp_path / "example.py"
        script.write_text(program, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, script],
            env={**os.environ, "EMBEDLINE_DSN": database_dsn, "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == (printed, "")
