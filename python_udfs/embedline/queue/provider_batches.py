"""Texts for a provider's batch endpoint, and the rows that wait for them.

A batch may take a day, and a claim lives no longer than its worker's session. So rows that wait for a batch are not claimed:
they are back in their queue, due when the batch is done. Then they are read like all others, and the vectors of the batch
are known by the hash of their text. A text that was edited meanwhile has another hash, and its vector is not used.

This module is the only writer of the three tables.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedline.catalog.values import Pipeline
from embedline.core.embedding import ModelConfig
from embedline.postgres.session import Session

# Seconds for which rows are held at most: a provider's day, and some time to read its answers. If their batch is open
# still, they are held again.
HOLD_SECONDS = 26 * 3600.0
# Batches that may end without an answer to a text. After that the ordinary endpoint is asked.
MOST_TRIES = 3
# A text of a batch that is gone, such as one that was deleted in a restored copy, waits for nothing.
_STATES = """
    SELECT uuid_send(t.content_hash) AS digest, t.tries, t.batch_id,
        CASE WHEN t.state = 'pending' AND NOT EXISTS (
            SELECT FROM embedline.provider_batch AS b WHERE b.batch_id = t.batch_id AND b.state <> 'done')
        THEN 'unanswered' ELSE t.state END AS state
    FROM embedline.provider_batch_text AS t WHERE t.version_id = $1 AND t.content_hash = ANY ($2::text[]::uuid[])
"""
_ANSWERS = """
    SELECT uuid_send(t.content_hash) AS digest, t.vector
    FROM embedline.provider_batch_text AS t JOIN embedline.provider_batch AS b ON b.batch_id = t.batch_id
    WHERE t.version_id = $1 AND t.content_hash = ANY ($2::text[]::uuid[]) AND t.state = 'answered' AND b.fingerprint = $3
        AND ($4::text IS NULL OR b.created_at >= $4::timestamptz)
"""
_HAS_TEXTS = "SELECT EXISTS (SELECT FROM embedline.provider_batch_text WHERE version_id = $1)"
_HAS_BATCHES = "SELECT EXISTS (SELECT FROM embedline.provider_batch WHERE version_id = $1)"
_COLLECTING = """
    SELECT batch_id, text_count, byte_count FROM embedline.provider_batch
    WHERE version_id = $1 AND state = 'collecting' AND fingerprint = $2 ORDER BY batch_id DESC LIMIT 1 FOR UPDATE SKIP LOCKED
"""
_BEGIN = """
    INSERT INTO embedline.provider_batch (pipeline_id, version_id, model_id, config, fingerprint)
    VALUES ($1, $2, $3, $4, $5) RETURNING batch_id
"""
# A text that another session adds at the same time stays in that one's batch.
_ADD_TEXTS = """
    WITH added AS (
        INSERT INTO embedline.provider_batch_text AS t (version_id, content_hash, batch_id, content, tokens)
        SELECT $1, n.content_hash, $2, n.content, n.tokens
        FROM unnest($3::text[]::uuid[], $4::text[], $5::integer[]) AS n (content_hash, content, tokens) ORDER BY 1, 2
        ON CONFLICT (version_id, content_hash) DO UPDATE SET batch_id = excluded.batch_id, content = excluded.content,
            tokens = excluded.tokens, state = 'pending', vector = NULL, detail = NULL
        WHERE t.state <> 'pending' OR NOT EXISTS (
            SELECT FROM embedline.provider_batch AS b WHERE b.batch_id = t.batch_id AND b.state <> 'done')
        RETURNING tokens
    )
    UPDATE embedline.provider_batch SET text_count = text_count + a.count, tokens = provider_batch.tokens + a.tokens,
        byte_count = byte_count + $6, touched_at = clock_timestamp(), next_at = clock_timestamp()
    FROM (SELECT count(*) AS count, coalesce(sum(tokens), 0) AS tokens FROM added) AS a WHERE batch_id = $2
"""
# Waits for the transaction that ends the batch, which has made its rows due before it commits.
_COUNT_ROWS = """
    UPDATE embedline.provider_batch SET row_count = row_count + $2 WHERE batch_id = $1 AND state <> 'done' RETURNING true
"""
_HOLD = (
    "INSERT INTO embedline.provider_batch_hold (batch_id, version_id, of_version, queue_ids) VALUES ($1, $2, $3, $4)"
)
_FORGET = """
    DELETE FROM embedline.provider_batch_text
    WHERE version_id = $1 AND content_hash = ANY ($2::text[]::uuid[]) AND state <> 'pending'
"""
# Batches of a model that failed one after the other up to now, and seconds since the last. What was too much for the limit
# of tokens is too much for a day.
_FAILURES = """
    SELECT count(*) AS count, extract(epoch FROM clock_timestamp() - max(b.ended_at))::float8 AS seconds, (
            SELECT min(l.text_count) FROM embedline.provider_batch AS l
            WHERE l.model_id = $1 AND l.outcome = 'failed' AND l.last_error LIKE '%token_limit%'
                AND l.ended_at > clock_timestamp() - interval '1 day') AS text_count
    FROM embedline.provider_batch AS b WHERE b.model_id = $1 AND b.outcome = 'failed' AND NOT EXISTS (
        SELECT FROM embedline.provider_batch AS o WHERE o.model_id = $1 AND o.batch_id > b.batch_id
            AND o.outcome IN ('completed', 'expired', 'cancelled'))
"""


@dataclass(frozen=True)
class TextState:
    """What is known of a text that was in a batch."""

    state: str
    tries: int
    batch_id: int


@dataclass(frozen=True)
class NewText:
    """A text to be added to a batch; `size` is its bytes in the file."""

    digest: bytes
    content: str
    tokens: int
    size: int


def has_texts(session: Session, version_id: int) -> bool:
    """Return True if texts of a version are, or were, in batches."""
    return bool(session.scalar(_HAS_TEXTS, ["bigint"], version_id))


def has_batches(session: Session, version_id: int) -> bool:
    """Return True if a version has a batch, or had one in the last days."""
    return bool(session.scalar(_HAS_BATCHES, ["bigint"], version_id))


def states(session: Session, version_id: int, digests: Collection[bytes]) -> dict[bytes, TextState]:
    """Return what is known of texts, by digest."""
    rows = session.query(_STATES, ["bigint", "text[]"], version_id, [digest.hex() for digest in digests])
    return {bytes(row["digest"]): TextState(row["state"], int(row["tries"]), int(row["batch_id"])) for row in rows}


def answers(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the vectors that batches have given of texts, by digest."""
    version = pipeline.version
    if version.model.config.provider != "openai" or not digests or not has_texts(session, version.version_id):
        return {}
    rows = session.query(
        _ANSWERS,
        ["bigint", "text[]", "text", "text"],
        version.version_id,
        [digest.hex() for digest in digests],
        version.fingerprint,
        version.vectors_valid_from,
    )
    return {bytes(row["digest"]): bytes(row["vector"]) for row in rows}


def forget(session: Session, pipeline: Pipeline, digests: Iterable[bytes]) -> None:
    """Remove texts whose vectors are written, but for those of open batches."""
    version = pipeline.version
    if version.model.config.provider == "openai" and has_texts(session, version.version_id):
        session.query(_FORGET, ["bigint", "text[]"], version.version_id, [digest.hex() for digest in digests])


def collecting(session: Session, pipeline: Pipeline) -> tuple[int, int, int] | None:
    """Return the batch of a version that is collected, with its texts and bytes.

    Return None if none is free.
    """
    version = pipeline.version
    rows = session.query(_COLLECTING, ["bigint", "text"], version.version_id, version.fingerprint)
    return (int(rows[0]["batch_id"]), int(rows[0]["text_count"]), int(rows[0]["byte_count"])) if rows else None


def begin(session: Session, pipeline: Pipeline) -> int:
    """Begin a batch of a version; return its number."""
    version = pipeline.version
    return int(
        session.scalar(
            _BEGIN,
            ["bigint", "bigint", "bigint", "jsonb", "text"],
            pipeline.pipeline_id,
            version.version_id,
            version.model.model_id,
            json.dumps(stored_config(version.model.config)),
            version.fingerprint,
        )
    )


def add_texts(session: Session, pipeline: Pipeline, batch_id: int, texts: Sequence[NewText]) -> None:
    """Add texts to a batch."""
    session.query(
        _ADD_TEXTS,
        ["bigint", "bigint", "text[]", "text[]", "integer[]", "bigint"],
        pipeline.version.version_id,
        batch_id,
        [text.digest.hex() for text in texts],
        [text.content for text in texts],
        [text.tokens for text in texts],
        sum(text.size for text in texts),
    )


def count_rows(session: Session, batch_id: int, count: int) -> bool:
    """Count rows that are about to wait for a batch.

    Return False if it has ended meanwhile. Locks the batch, so that it ends only after the rows are noted.
    """
    return bool(session.scalar(_COUNT_ROWS, ["bigint", "bigint"], batch_id, count))


def hold(session: Session, pipeline: Pipeline, batch_id: int, queue_ids: Sequence[int], *, of_version: bool) -> None:
    """Note that entries of a queue wait for a batch, which `count_rows` has locked."""
    types = ["bigint", "bigint", "boolean", "bigint[]"]
    session.query(_HOLD, types, batch_id, pipeline.version.version_id, of_version, list(queue_ids))


def failures(session: Session, model_id: int) -> tuple[int, float, int | None]:
    """Return how many batches of a model failed in a row, and how long ago.

    These are the last ones, and seconds since the very last. The third value is the least number of texts that was too much
    for the provider lately, None if none was.
    """
    row = session.query(_FAILURES, ["bigint"], model_id)[0]
    return int(row["count"]), float(row["seconds"] or 0.0), row["text_count"]


def stored_config(config: ModelConfig) -> dict[str, Any]:
    """Return the facts of a model by which its provider can be asked later."""
    facts = asdict(config)
    # Who may be asked is decided when it is asked.
    del facts["allowed_endpoints"]
    facts["options"], facts["learned"] = dict(config.options), dict(config.learned)
    return facts
