"""Each statement of the how-to about pictures runs, in the page's order."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import psycopg

from embedline.client.build_index import PsycopgClient, build
from pictures import COLOURS, picture
from support import scalar, settle

_PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/search-pictures.md"
_BLOCK = re.compile(r"^```postgresql\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
# Titles that the page asks for.
_TITLES = ("athletic shoe", "saxophone")


def _fill(connection: psycopg.Connection) -> None:
    rows = [
        (key, _TITLES[key % 2] if key < 3 else colour, 10 * key, picture(colour)) for key, colour in COLOURS.items()
    ]
    rows.append((32, "a shelf", 5, picture("pink", (272, 272))))
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO product (id, title, price, photo) VALUES (%s, %s, %s, %s)", rows)


def test_each_statement_of_the_page_runs(database: psycopg.Connection, towers: Path) -> None:
    # The same vectors under another fingerprint.
    other = towers.with_name("catalogue-2")
    shutil.copytree(towers, other)
    with (other / "towers.json").open("a") as file:
        file.write("\n")
    create, *blocks = _BLOCK.findall(_PAGE.read_text(encoding="utf-8"))
    database.execute(create)
    _fill(database)
    found: dict[str, list[tuple[object, ...]]] = {}
    for block in blocks:
        if "evaluate(" in block:
            build(PsycopgClient(database), "product", 2)
        block = block.replace("/srv/models/catalogue-2", str(other)).replace("/srv/models/catalogue'", f"{towers}'")
        for statement in filter(str.strip, re.split(r";\n", block)):
            cursor = database.execute(statement.encode())
            found[statement.strip()] = cursor.fetchall() if cursor.description else []
        if "create_pipeline('product'" in block or "embed_pending" in block:
            # As the page's own call, but for what a retry has to wait for.
            settle(database)
    searches = {statement: rows for statement, rows in found.items() if "embedline.search(" in statement}
    assert len(searches) == 6
    assert all(rows for statement, rows in searches.items() if "twin" not in statement)
    (letters,) = (rows for statement, rows in found.items() if "dead_letter ORDER" in statement)
    assert [key for key, _ in letters] == [{"id": "901"}, {"id": "902"}]
    assert scalar(database, "SELECT version FROM embedline.versions WHERE pipeline = 'product' AND serving") == 2
