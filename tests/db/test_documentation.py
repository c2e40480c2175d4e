"""What README.md and docs/reference.md tell people to type works, and prints what they say.

`EMBEDLINE_UPDATE_DOCS=1 make test ARGS='-k reference'` writes what the reference's examples print into docs/reference.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference.md"
README = ROOT / "README.md"
_SQL_BLOCK = re.compile(r"```sql\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# What an estimate may differ by between servers. PostgreSQL 16 extends a table by other steps than 15, so the same rows lie in
# other blocks, and other rows are drawn (0.2 % between 15.20 and 17.12); its builds take less memory for a graph (3.4 %).
_ESTIMATE_TOLERANCE = 0.05


def _psql(dsn: str, statements: str) -> str:
    """Run statements as a person would in a fresh psql, and return all that psql shows."""
    done = subprocess.run(
        ["psql", "-X", "-q", "-f", "-", dsn],
        input="\\set SHOW_CONTEXT never\n" + statements,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, "PGOPTIONS": "-c client_min_messages=warning", "LC_ALL": "C.UTF-8", "PAGER": ""},
    )
    shown = re.sub(r"^psql:<stdin>:\d+: ", "", done.stdout, flags=re.MULTILINE)
    return "\n".join(line.rstrip() for line in shown.strip("\n").split("\n"))


def _public_objects(connection: psycopg.Connection) -> Iterator[str]:
    query = """
        SELECT DISTINCT p.proname FROM pg_proc AS p
        WHERE p.pronamespace = 'embedline'::regnamespace AND NOT starts_with(p.proname, '_') ORDER BY 1
    """
    for (name,) in connection.execute(query):
        yield name


def test_reference_examples_print_what_the_reference_says(database: psycopg.Connection, database_dsn: str) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    blocks = list(_SQL_BLOCK.finditer(text))
    assert len(blocks) > 15
    shown = [(block, _psql(database_dsn, block.group(1))) for block in blocks]
    if os.environ.get("EMBEDLINE_UPDATE_DOCS"):
        for block, output in reversed(shown):
            example = f"```sql\n{block.group(1)}```\n" + (f"\n```text\n{output}\n```\n" if output else "")
            text = text[: block.start()] + example + text[block.end() :]
        REFERENCE.write_text(text, encoding="utf-8")
        return
    for block, output in shown:
        printed = (block.group(2) or "").rstrip("\n")
        if "embedline.estimate(" in block.group(1):
            assert _words(output) == _words(printed), f"after\n{block.group(1)}"
            assert _numbers(output) == pytest.approx(_numbers(printed), rel=_ESTIMATE_TOLERANCE)
        else:
            assert output == printed, f"after\n{block.group(1)}"


def _words(output: str) -> list[str]:
    return re.sub("-+", "-", _NUMBER.sub("#", output)).split()  # the rule's length is that of the numbers


def _numbers(output: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(output)]


def test_reference_has_a_section_for_every_public_function(database: psycopg.Connection) -> None:
    headings = " ".join(re.findall(r"^### (.*)$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE))
    missing = [name for name in _public_objects(database) if not re.search(rf"\b{name}\b", headings)]
    assert missing == []


def test_reference_shows_every_parameter(database: psycopg.Connection) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    rows = database.execute(
        "SELECT p.proname, p.proargnames FROM pg_proc AS p"
        " WHERE p.pronamespace = 'embedline'::regnamespace AND NOT starts_with(p.proname, '_') AND p.proargnames IS NOT NULL"
    ).fetchall()
    for name, parameters in rows:
        # Its signature, not an example of another section that calls it.
        signature = re.search(rf"```postgresql\n(?:CALL )?(?:[^`]*\n)?(?:CALL )?embedline\.{name}\([^`]*```", text)
        assert signature is not None, name
        assert [p for p in parameters if not re.search(rf"\b{p}\b", signature.group())] == [], name


@pytest.mark.parametrize("command", ["demo", "test"])
def test_readme_names_make_targets_that_exist(command: str) -> None:
    assert f"make {command}" in README.read_text(encoding="utf-8")
    done = subprocess.run(["make", "-n", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_readme_quick_start_on_an_existing_database(empty_database_dsn: str) -> None:
    text = README.read_text(encoding="utf-8")
    start = text.index("## In a database of yours")
    section = text[start : text.index("\n## ", start + 1)]
    assert "embedline upgrade" in section
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE docs (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text, body text, lang text)"
        )
        connection.execute(
            "INSERT INTO docs (title, body, lang) VALUES ('Deadlocks', 'Two transactions wait for each other.', 'en'),"
            " ('Bread', 'Knead the dough and bake it.', 'en'), ('Brot', 'Den Teig kneten und backen.', 'de')"
        )
    environment = {**os.environ, "EMBEDLINE_DSN": empty_database_dsn}
    upgrade = [sys.executable, "-m", "embedline.client.cli", "upgrade"]
    done = subprocess.run(upgrade, env=environment, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # The hub is not to be had in a test; this is the same model from a wheel.
    statements = "".join(re.findall(r"```sql\n(.*?)```", section, re.DOTALL))
    assert _HUB_NAME in statements
    shown = _psql(empty_database_dsn, statements.replace(_HUB_NAME, str(ROOT / ".models" / "minilm")))
    assert "ERROR" not in shown, shown
    assert "Deadlocks" in shown
    assert "Two transactions wait for each other." in shown
