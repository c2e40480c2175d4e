"""A long drain with a provider that fails every fifth request, in five ways: every row ends well or with its reason."""

from __future__ import annotations

import psycopg

from embedline.models.health_check import PROBE_TEXT
from stub_provider import FAULTS, StubProvider
from support import scalar
from working import (
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    insert_rows,
    work_until_idle,
)

ROWS = 100_000
POISON = 7


def test_a_drain_of_100_000_rows_with_a_failing_provider_loses_none(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    # A request that is not answered costs half a second here, not a minute.
    create_stub_model(stub_database, stub, max_batch_items=250, timeout_seconds=0.5)
    # Half of the rows are there before the pipeline, half are live changes.
    create_stub_pipeline(stub_database, rows=ROWS // 2)
    insert_rows(stub_database, ROWS // 2 + 1, ROWS)
    poison = [1 + n * (ROWS // POISON) for n in range(POISON)]
    stub_database.execute("UPDATE page SET body = body || ' POISON' WHERE id = ANY (%s)", (poison,))
    stub.behave(fault_share=0.2, faults=FAULTS, poison="POISON", remember=True)
    work_until_idle(stub_database, count=2, seconds=60)
    counts = stub.counts()
    assert all(counts[fault] > 0 for fault in FAULTS), counts

    embedded = assert_all_settled(stub_database, stub.dimensions)
    letters = dead_letters(stub_database)
    assert embedded + len(letters) == ROWS
    assert scalar(stub_database, "SELECT backfill_complete FROM embedline.status")
    for key in poison:
        assert letters[key][:2] == ("embed", "EL012")
        assert "400" in letters[key][2]
    # Of the others a few may have met a fault at every one of their tries; each says which.
    others = {key: letter for key, letter in letters.items() if key not in poison}
    assert {letter[:2] for letter in others.values()} <= {("embed", "EL011"), ("embed", "EL014")}
    assert len(others) <= ROWS / 100
    # No worker was killed, so nothing was paid for twice; neighbours of a poison row neither.
    # A row that failed five times made its worker ask for a text of its own, which is no row's.
    seen = {text: count for text, count in stub.texts_seen().items() if text != PROBE_TEXT}
    assert [text for text, count in seen.items() if count > 1] == []
    assert len(seen) == embedded
