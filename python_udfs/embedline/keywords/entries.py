"""Write the words of new chunks, in the transaction that writes the chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from embedline.catalog.values import Pipeline
from embedline.postgres.session import Session


def add_entries(session: Session, pipeline: Pipeline, chunk_set: int, chunk_ids: Sequence[int]) -> None:
    """Write the words of chunks that are stored already.

    A chunk that has an entry keeps it, because a chunk's text never changes.
    """
    if not chunk_ids:
        return
    with _without_notices(session):
        session.query(
            f"""
            INSERT INTO {pipeline.keyword_table("entry", chunk_set)} (chunk_id, length, words, counts)
            SELECT c.chunk_id, t.length, t.words, t.counts FROM {pipeline.chunk_table(chunk_set)} AS c
            CROSS JOIN LATERAL {pipeline.search_function("keyword_terms")}(concat_ws(E'\\n', c.prefix, c.content)) AS t
            WHERE c.chunk_id = ANY ($1) ON CONFLICT DO NOTHING
            """,
            ["bigint[]"],
            list(chunk_ids),
        )


def remove_entries(session: Session, pipeline: Pipeline, chunk_set: int, chunk_ids: Sequence[int]) -> None:
    """Remove the words of chunks that are removed.

    What is in a segment stays there until the segment is packed again, and is shown no more. So does an entry that another
    transaction is packing: no writer waits for it.
    """
    if chunk_ids:
        table = pipeline.keyword_table("entry", chunk_set)
        session.query(
            f"DELETE FROM {table} WHERE chunk_id IN"
            f" (SELECT e.chunk_id FROM {table} AS e WHERE e.chunk_id = ANY ($1) FOR UPDATE SKIP LOCKED)",
            ["bigint[]"],
            list(chunk_ids),
        )


@contextmanager
def _without_notices(session: Session) -> Iterator[None]:
    """Do not tell the client that a word is too long to be indexed.

    A chunk of base64 is one such word.
    """
    setting = "SELECT current_setting('client_min_messages') AS before, set_config('client_min_messages', $1, true)"
    before = session.query(setting, ["text"], "warning")[0]["before"]
    yield
    session.query(setting, ["text"], before)
