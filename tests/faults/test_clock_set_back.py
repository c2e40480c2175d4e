"""A clock that was set back by a day, as the tables show it: each time in them lies a day further ahead."""

from __future__ import annotations

import psycopg

from generated_names import PAGE
from killing import ROWS, assert_nothing_lost
from stub_provider import StubProvider
from support import queued, scalar, settle, wait_until
from working import create_stub_model, create_stub_pipeline, insert_rows, working


def test_a_clock_that_was_set_back_by_a_day_delays_no_row_by_a_day(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    insert_rows(stub_database, 1, ROWS)
    stub.behave(fault_share=1, faults=["500"])
    with working(stub_database):
        is_resting = "SELECT count(*) FROM embedline.circuit"
        wait_until(lambda: scalar(stub_database, is_resting), 20, "the model rests until a time of the clock")
    insert_rows(stub_database, ROWS + 1, ROWS + 10)
    with working(stub_database):
        for change in (
            f"{PAGE('outbox')} SET not_before = not_before + interval '1 day'",
            f"{PAGE('inbox')} SET enqueued_at = enqueued_at + interval '1 day'",
            "embedline.signal SET due_at = due_at + interval '1 day'",
            "embedline.circuit SET open_until = open_until + interval '1 day'",
        ):
            stub_database.execute(f"UPDATE {change}")
        stub.behave(remember=True)
        # Within its next round.
        wait_until(lambda: queued(stub_database) == 0, 60, "nothing waits")
    assert_nothing_lost(stub_database, stub, ROWS + 10, 0)
