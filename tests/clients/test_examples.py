"""The example of each client's page prints what the page says, and has under 30 lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from support import ROOT

_HOW_TO = ROOT / "docs" / "how-to"
_PAGES = ("use-langchain", "use-sqlalchemy")
_LINES = 30
_SETUP = re.compile(r"^<!-- run\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
_EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", _PAGES)
def test_an_example_prints_what_its_page_says(
    page: str, database: psycopg.Connection, database_dsn: str, tmp_path: Path
) -> None:
    text = (_HOW_TO / f"{page}.md").read_text(encoding="utf-8")
    for statements in _SETUP.findall(text):
        database.execute(statements.encode())
    examples = _EXAMPLE.findall(text)
    assert examples
    for program, printed in examples:
        assert len(program.splitlines()) < _LINES
        script = tmp_path / "example.py"
        script.write_text(program, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, script],
            env={**os.environ, "EMBEDLINE_DSN": database_dsn},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == (printed, "")
