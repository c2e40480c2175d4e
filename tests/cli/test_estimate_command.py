"""`embedline estimate`: figures and ways to embed, by the width of the terminal."""

from __future__ import annotations

import json

import psycopg
import pytest

from command_line import lines_in_terminal, run
from support import create_pages, create_pipeline

_PRICES = (
    "--price-per-million-tokens", "0.1", "--machine-price-per-hour", "0.5", "--own-tokens-per-second", "20000",
    "--documents-per-day", "10000", "--bulk-share", "0.9", "--batch-discount", "0.5",
)  # fmt: skip


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    create_pages(database, 150)
    create_pipeline(database)
    return database


def test_estimate_for_programs_has_numbers_and_no_comparison_unasked(
    pages: psycopg.Connection, database_dsn: str
) -> None:
    found = json.loads(run(database_dsn, "estimate", "page", "--json").stdout)
    figures = {row["figure"]: row["value"] for row in found["estimate"]}
    assert (figures["rows"], figures["chunks"]) == (150, 150)
    assert found["comparison"] is None
    table = run(database_dsn, "estimate", "page", "--model", "static-256", "--content", "body")
    assert table.returncode == 0, table.stderr


def test_an_option_of_the_comparison_asks_for_it(pages: psycopg.Connection, database_dsn: str) -> None:
    found = json.loads(run(database_dsn, "estimate", "page", "--json", *_PRICES).stdout)
    months = {row["way"]: row["value"] for row in found["comparison"] if row["figure"] == "month"}
    assert months["own"] == 365.25
    assert 0 < months["hybrid"] < months["hosted"] < months["own"]


def test_the_comparison_in_a_pipe_has_a_column_for_each_way(pages: psycopg.Connection, database_dsn: str) -> None:
    lines = run(database_dsn, "estimate", "page", *_PRICES).stdout.splitlines()
    assert lines[0].split() == ["figure", "value", "low", "high", "unit", "note"]
    assert ["figure", "hosted", "own", "hybrid", "unit"] in [line.split() for line in lines]
    (month,) = [line.split() for line in lines if line.startswith("month  ")]
    assert (month[2], month[-1]) == ("365.25", "money")
    assert any(line.startswith("hosted and own, crossover: 6,640,909,091 tokens a month") for line in lines)


@pytest.mark.parametrize("columns", [80, 50])
def test_an_estimate_fits_the_terminal(pages: psycopg.Connection, database_dsn: str, columns: int) -> None:
    lines = lines_in_terminal("estimate", "page", *_PRICES, "--dsn", database_dsn, columns=columns)
    # A statement to copy is one word.
    assert max(len(line) for line in lines if "(" not in line or columns == 80) <= columns
    assert ["rows", "150", "rows"] in [line.split() for line in lines]
    assert any("crossover" in line for line in lines)


def test_what_cannot_be_estimated_is_an_error(pages: psycopg.Connection, database_dsn: str) -> None:
    absent = run(database_dsn, "estimate", "nothing")
    assert (absent.returncode, absent.stdout) == (1, "")
    assert "HINT: Give the name of a pipeline" in absent.stderr
    share = run(database_dsn, "estimate", "page", "--bulk-share", "90")
    assert share.returncode == 1
    assert "bulk_share must be between 0 and 1, not 90" in share.stderr
