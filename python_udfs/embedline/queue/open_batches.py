"""Batches on their way: collected, sent, waiting at the provider, and done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedline.catalog.values import Pipeline
from embedline.postgres.session import Session

# Batches with work, those that wait the longest first. Of a paused pipeline nothing is sent.
_DUE = """
    SELECT b.batch_id, b.pipeline_id, b.version_id, b.model_id, b.config, b.token, b.state, b.provider_id, b.text_count,
        b.reservation_id, b.attempts, p.name AS pipeline, v.number AS version, v.version_id IS NULL AS is_orphan,
        extract(epoch FROM clock_timestamp() - coalesce(b.sent_at, b.created_at))::float8 AS age,
        extract(epoch FROM clock_timestamp() - b.touched_at)::float8 AS quiet_seconds,
        EXISTS (SELECT FROM embedline.backfill_range AS r WHERE r.pipeline_id = b.pipeline_id AND NOT r.done)
            OR EXISTS (SELECT FROM embedline.version_queue AS q WHERE q.version_id = b.version_id AND q.of_backfill
                AND (q.first_id IS NOT NULL OR q.not_before <= clock_timestamp())) AS is_growing
    FROM embedline.provider_batch AS b
    LEFT JOIN embedline.version AS v ON v.version_id = b.version_id
    LEFT JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
    WHERE b.state <> 'done' AND b.next_at <= clock_timestamp()
        AND (p.name IS NULL OR (($1::text IS NULL OR p.name = $1) AND (p.state = 'active' OR b.state <> 'collecting')))
    ORDER BY b.next_at, b.batch_id LIMIT $2
"""
_TEXTS = """
    SELECT array_agg(t.text_id ORDER BY t.text_id) AS ids, array_agg(t.content ORDER BY t.text_id) AS contents,
        array_agg(t.tokens ORDER BY t.text_id) AS tokens
    FROM embedline.provider_batch_text AS t WHERE t.batch_id = $1 AND t.state = 'pending'
"""
# The texts beyond those that a budget allows become a batch of their own. No row is held by it: a row that still lacks it
# once the first batch is done is held again.
_DIVIDE = """
    WITH rest AS (
        INSERT INTO embedline.provider_batch (pipeline_id, version_id, model_id, config, fingerprint, last_error, next_at)
        SELECT pipeline_id, version_id, model_id, config, fingerprint, $4, clock_timestamp() + make_interval(secs => $3)
        FROM embedline.provider_batch WHERE batch_id = $1 RETURNING batch_id
    ), moved AS (
        UPDATE embedline.provider_batch_text AS t SET batch_id = rest.batch_id FROM rest
        WHERE t.batch_id = $1 AND t.text_id > $2 RETURNING t.batch_id, t.tokens
    )
    SELECT rest.batch_id, (SELECT count(*) FROM moved) AS count, (SELECT coalesce(sum(tokens), 0) FROM moved) AS tokens FROM
    rest
"""
_RESIZE = "UPDATE embedline.provider_batch SET text_count = $2, tokens = $3 WHERE batch_id = $1"
_SENDING = """
    UPDATE embedline.provider_batch SET state = 'sending', attempts = attempts + 1,
        sent_at = coalesce(sent_at, clock_timestamp()),
        next_at = clock_timestamp() + make_interval(secs => $2), reservation_id = coalesce($3, reservation_id),
        config = $4
    WHERE batch_id = $1
"""
_WAITING = """
    UPDATE embedline.provider_batch SET state = 'waiting', provider_id = $2, attempts = 0, last_error = NULL,
        next_at = clock_timestamp() + make_interval(secs => $3) WHERE batch_id = $1
"""
_PUT_OFF = """
    UPDATE embedline.provider_batch SET next_at = clock_timestamp() + make_interval(secs => $2),
        last_error = coalesce($3, last_error), attempts = attempts + $4 WHERE batch_id = $1
"""
# The numbers twice: without statistics the join alone read all texts for each of them, for 8 s.
_KEEP_ANSWERS = """
    UPDATE embedline.provider_batch_text AS t SET state = CASE WHEN a.vector IS NULL THEN 'refused' ELSE 'answered' END,
        vector = a.vector, detail = a.detail, content = NULL
    FROM unnest($2::bigint[], $3::bytea[], $4::text[]) AS a (text_id, vector, detail)
    WHERE t.text_id = a.text_id AND t.batch_id = $1 AND t.text_id = ANY ($2) AND t.state = 'pending'
"""
_END_TEXTS = """
    UPDATE embedline.provider_batch_text SET state = 'unanswered', tries = tries + $2, content = NULL
    WHERE batch_id = $1 AND state = 'pending'
"""
_END = """
    UPDATE embedline.provider_batch SET state = 'done', outcome = $2, last_error = $3, ended_at = clock_timestamp()
    WHERE batch_id = $1
"""
_RELEASED = "DELETE FROM embedline.provider_batch_hold WHERE batch_id = $1 RETURNING of_version, queue_ids"
_WAKE_LISTS = """
    UPDATE embedline.version_queue SET not_before = clock_timestamp() WHERE queue_id IN (
        SELECT queue_id FROM embedline.version_queue WHERE queue_id = ANY ($1) AND not_before > clock_timestamp()
        FOR UPDATE SKIP LOCKED)
"""
_PURGE = """
    WITH old AS (
        DELETE FROM embedline.provider_batch WHERE state = 'done' AND ended_at < clock_timestamp() - interval '7 days'
        RETURNING batch_id
    )
    DELETE FROM embedline.provider_batch_text WHERE batch_id IN (SELECT batch_id FROM old)
"""


@dataclass(frozen=True)
class OpenBatch:
    """A batch that something is to be done with."""

    batch_id: int
    pipeline_id: int
    version_id: int
    model_id: int
    config: Mapping[str, Any]
    token: str
    state: str
    provider_id: str | None
    text_count: int
    reservation_id: int | None
    attempts: int
    pipeline: str | None
    version: int | None
    is_orphan: bool
    age: float
    quiet_seconds: float
    is_growing: bool


@dataclass(frozen=True)
class Texts:
    """The texts of a batch, in the order of their numbers."""

    ids: list[int]
    contents: list[str]
    tokens: list[int]


def due(session: Session, pipeline_name: str | None, limit: int) -> list[OpenBatch]:
    """Return batches that something is to be done with now."""
    rows = session.query(_DUE, ["text", "integer"], pipeline_name, limit)
    return [OpenBatch(**{**row, "config": json.loads(row["config"])}) for row in rows]


def texts_of(session: Session, batch_id: int) -> Texts:
    """Return the texts of a batch that are not answered."""
    row = session.query(_TEXTS, ["bigint"], batch_id)[0]
    return Texts(list(row["ids"] or ()), list(row["contents"] or ()), list(row["tokens"] or ()))


def divide(session: Session, batch_id: int, texts: Texts, count: int, put_off: tuple[float, str]) -> None:
    """Leave `count` texts in a batch.

    The others become one of their own, put off for some seconds, for a reason.
    """
    types = ["bigint", "bigint", "float8", "text"]
    row = session.query(_DIVIDE, types, batch_id, texts.ids[count - 1], *put_off)[0]
    for number, kept, tokens in (
        (int(row["batch_id"]), int(row["count"]), int(row["tokens"])),
        (batch_id, count, sum(texts.tokens[:count])),
    ):
        session.query(_RESIZE, ["bigint", "integer", "bigint"], number, kept, tokens)


def mark_sending(
    session: Session, batch_id: int, seconds: float, reservation_id: int | None, config: Mapping[str, Any]
) -> None:
    """Note that the provider is about to be asked for a batch.

    Other workers leave it alone for some seconds after this one has died: a request may be on its way.
    """
    types = ["bigint", "float8", "bigint", "jsonb"]
    session.query(_SENDING, types, batch_id, seconds, reservation_id, json.dumps(config))


def mark_waiting(session: Session, batch_id: int, provider_id: str, seconds: float) -> None:
    """Note the batch's number at the provider; it is asked for after some seconds."""
    session.query(_WAITING, ["bigint", "text", "float8"], batch_id, provider_id, seconds)


def put_off(session: Session, batch_id: int, seconds: float, error: str | None = None) -> None:
    """Deal with a batch later; a try that failed counts."""
    session.query(
        _PUT_OFF, ["bigint", "float8", "text", "integer"], batch_id, seconds, error, 0 if error is None else 1
    )


def keep_answers(session: Session, batch_id: int, found: Sequence[tuple[int, bytes | None, str | None]]) -> None:
    """Keep the vectors of texts, by number.

    Without a vector the provider has refused the text. The first answer to a text counts, and none to a text of another batch.
    """
    session.query(
        _KEEP_ANSWERS,
        ["bigint", "bigint[]", "bytea[]", "text[]"],
        batch_id,
        [number for number, _, _ in found],
        [vector for _, vector, _ in found],
        [detail for _, _, detail in found],
    )


def end(
    session: Session, batch_id: int, outcome: str, error: str | None, *, is_charged: bool
) -> list[tuple[bool, list[int]]]:
    """End a batch; return the entries of the queues that waited for it.

    They are of versions (True) or of the outbox. Texts without an answer may be put into another batch; the try counts if
    `is_charged`.
    """
    session.query(_END_TEXTS, ["bigint", "smallint"], batch_id, int(is_charged))
    session.query(_END, ["bigint", "text", "text"], batch_id, outcome, error)
    rows = session.query(_RELEASED, ["bigint"], batch_id)
    return [(bool(row["of_version"]), list(row["queue_ids"])) for row in rows]


def wake(session: Session, pipeline: Pipeline, held: Sequence[tuple[bool, list[int]]]) -> None:
    """Make entries of the queues due that waited for a batch."""
    lists = [queue_id for of_version, ids in held if of_version for queue_id in ids]
    rows = [queue_id for of_version, ids in held if not of_version for queue_id in ids]
    if lists:
        session.query(_WAKE_LISTS, ["bigint[]"], lists)
    if rows:
        session.query(
            f"""
            UPDATE {pipeline.outbox} SET not_before = clock_timestamp() WHERE outbox_id IN (
                SELECT outbox_id FROM {pipeline.outbox} WHERE outbox_id = ANY ($1) AND not_before > clock_timestamp()
                FOR UPDATE SKIP LOCKED)
            """,
            ["bigint[]"],
            rows,
        )
    session.query("INSERT INTO embedline.signal (pipeline) VALUES ($1)", ["text"], pipeline.name)


def purge(session: Session) -> None:
    """Remove batches that ended a week ago, with what is left of their answers."""
    session.query(_PURGE)


def take(session: Session, batch_id: int) -> bool:
    """Lock a batch that is collected; return False if a worker adds texts to it.

    The lock lasts to the end of the transaction.
    """
    query = "SELECT 1 FROM embedline.provider_batch WHERE batch_id = $1 AND state = 'collecting' FOR UPDATE SKIP LOCKED"
    return session.scalar(query, ["bigint"], batch_id) is not None


def is_superseded(session: Session, batch: OpenBatch) -> bool:
    """Return True if this batch is full: a later one of the version is collected."""
    query = "SELECT 1 FROM embedline.provider_batch WHERE version_id = $1 AND state = 'collecting' AND batch_id > $2 LIMIT 1"
    return session.scalar(query, ["bigint", "bigint"], batch.version_id, batch.batch_id) is not None


def is_marked(session: Session, batch_id: int) -> bool:
    """Return True if a batch is about to be sent."""
    query = "SELECT 1 FROM embedline.provider_batch WHERE batch_id = $1 AND state = 'sending'"
    return session.scalar(query, ["bigint"], batch_id) is not None


def estimates(session: Session, batch_id: int) -> dict[int, int]:
    """Return the tokens that were reserved for each text of a batch, by number."""
    query = """
        SELECT array_agg(text_id) AS ids, array_agg(tokens) AS tokens FROM embedline.provider_batch_text WHERE batch_id = $1
    """
    row = session.query(query, ["bigint"], batch_id)[0]
    return dict(zip(row["ids"] or (), row["tokens"] or (), strict=True))
