"""A model host that dies for want of memory: the text that does not fit is tried again, its neighbours are embedded."""

from __future__ import annotations

import psycopg

from fault_table import note
from small_models import static_model
from support import assert_exact, create_pipeline, scalar, settle, wait_until
from working import dead_letters, wait_for_chunks, working

ROWS = 50
# Less than the tokens of a text of 8 MB take, and enough for all others.
_LIMIT_MB = 260
_HUGE = "repeat('rivers and mountains ', 400000)"


def test_a_host_that_dies_for_want_of_memory_takes_no_other_row_along(database: psycopg.Connection) -> None:
    options = f'{{"memory_limit_mb": {_LIMIT_MB}}}'
    query = "SELECT embedline.create_model('static-64', 'sentence-transformers', %s, options => %s::jsonb)"
    database.execute(query, (str(static_model(64)), options))
    database.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    database.execute("INSERT INTO page SELECT g, 'row ' || g FROM generate_series(1, %s) AS g", (ROWS,))
    database.execute(f"UPDATE page SET body = {_HUGE} WHERE id = 7")
    create_pipeline(database, content="body", model="static-64", chunking="none", index_method="none")
    with working(database):
        wait_for_chunks(database, "page", ROWS - 1, 60)
        # It has died at least once, and another one has embedded the neighbours.
        last_error = "SELECT last_error FROM embedline.status"
        wait_until(lambda: "memory allocation" in (scalar(database, last_error) or ""), 90, "the reason is shown")
        assert dead_letters(database) == {}
        database.execute("UPDATE page SET body = 'short again' WHERE id = 7")
        wait_for_chunks(database, "page", ROWS, 60)
    settle(database)
    assert assert_exact(database) == ROWS
    note(ROWS)
