"""Remove the documents and chunks of deleted rows.

They are removed once no earlier change waits that could use their vectors. A DELETE, and an UPDATE of the key, only
append the old key. The chunks cannot be seen from then on, because every view and search joins the live row. Chunks
that stand under the key of a new row are hidden by a mark (see capture).

A text that returns under another key takes its vector from them. So they stay until each change made before or with the
deletion is done. Times compare the starts of transactions, so that a deletion and an insertion in one transaction have
the same time.
"""

from __future__ import annotations

from embedline.catalog.values import Pipeline
from embedline.documents.remove import queue_deleted, remove_deleted
from embedline.postgres.session import Session

# Keys whose chunks are removed in one transaction, so that it stays short.
_KEYS = 1000
# Age at which they are removed in any case, because a provider may be away for days.
_LONGEST_WAIT = "10 minutes"
# Rows that wait for a provider's batch, for hours, have found no vector of theirs and use none later.
_IS_NEAR = "o.not_before < clock_timestamp() + interval '1 hour'"

# $1 is the number of keys. Keys that are `is_ready` no longer wait for the serving version.
_TAKE = """
    WITH oldest AS MATERIALIZED (
        SELECT least(
            (SELECT min(i.enqueued_at) FROM {inbox} AS i),
            (SELECT min(c.enqueued_at) FROM {claim} AS c),
            (SELECT min(o.enqueued_at) FROM {outbox} AS o WHERE {is_near})) AS enqueued_at
    ), sized AS (
        SELECT d.place, sum(d.key_count) OVER (ROWS UNBOUNDED PRECEDING) - d.key_count AS before FROM (
            SELECT t.ctid AS place, cardinality(t.{first}) AS key_count FROM {deleted} AS t
            WHERE ({is_ready}) OR t.enqueued_at < clock_timestamp() - interval '{longest}' LIMIT $1
        ) AS d
    ), front AS MATERIALIZED (
        SELECT ctid AS place FROM {deleted} WHERE ctid = ANY (ARRAY(SELECT s.place FROM sized AS s WHERE s.before < $1))
        FOR UPDATE SKIP LOCKED
    ), taken AS (
        DELETE FROM {deleted} WHERE ctid = ANY (ARRAY(SELECT f.place FROM front AS f)) RETURNING *
    ), key AS (
        -- Equal keys may be spelled differently (1.0 and 1.00): all go by the spelling of one.
        SELECT DISTINCT ON ({keys}) k.*, taken.enqueued_at FROM taken
        CROSS JOIN LATERAL unnest({arrays}) AS k ({keys}) ORDER BY {keys}, taken.enqueued_at
    )
    SELECT (SELECT count(*) FROM taken) AS row_count, min(key.enqueued_at)::text AS enqueued_at, {texts} FROM key
"""
_EARLIER = "t.enqueued_at < coalesce((SELECT o.enqueued_at FROM oldest AS o), 'infinity')"
# For versions that embed the new chunks later than the serving one: lists of chunks since then. $2 is the pipeline.
_SEEN = """
    t.seen_at < coalesce((
        SELECT min(q.enqueued_at) FROM embedline.version_queue AS q JOIN embedline.version AS v USING (version_id)
        WHERE v.pipeline_id = $2 AND q.chunk_ids IS NOT NULL
            AND q.not_before < clock_timestamp() + interval '1 hour'), 'infinity')
"""
_NOTE = """
    WITH oldest AS MATERIALIZED (
        SELECT least(
            (SELECT min(i.enqueued_at) FROM {inbox} AS i),
            (SELECT min(c.enqueued_at) FROM {claim} AS c),
            (SELECT min(o.enqueued_at) FROM {outbox} AS o WHERE {is_near})) AS enqueued_at
    ), front AS MATERIALIZED (
        SELECT t.ctid AS place FROM {deleted} AS t WHERE t.seen_at IS NULL AND {earlier} FOR UPDATE SKIP LOCKED
    ), noted AS (
        UPDATE {deleted} SET seen_at = clock_timestamp() WHERE ctid = ANY (ARRAY(SELECT f.place FROM front AS f)) RETURNING 1
    )
    SELECT count(*) FROM noted
"""
# Removes the kept vectors of replaced chunks once all lists of other versions are done, because lists follow their
# chunks.
_FORGET = """
    WITH oldest AS MATERIALIZED (
        SELECT least(
            (SELECT min(i.enqueued_at) FROM {inbox} AS i),
            (SELECT min(c.enqueued_at) FROM {claim} AS c),
            (SELECT min(o.enqueued_at) FROM {outbox} AS o WHERE {is_near})) AS enqueued_at
    )
    DELETE FROM {lent} WHERE ctid = ANY (ARRAY(
        SELECT t.ctid FROM {lent} AS t
        WHERE (t.kept_at < coalesce((SELECT o.enqueued_at FROM oldest AS o), 'infinity') AND NOT EXISTS (
                SELECT FROM embedline.version_queue AS q JOIN embedline.version AS v USING (version_id)
                WHERE v.pipeline_id = $1 AND q.chunk_ids IS NOT NULL
                    AND q.not_before < clock_timestamp() + interval '1 hour'))
            OR t.kept_at < clock_timestamp() - interval '{longest}'
        FOR UPDATE SKIP LOCKED))
"""


def remove_some(session: Session, pipeline: Pipeline) -> bool:
    """Remove the stored data of up to 1,000 deleted rows.

    Returns True if there may be more to do now. The caller's transaction must be short and hold the source. Does not
    wait for a lock of an application.
    """
    names = {
        "inbox": pipeline.generated("inbox"),
        "claim": pipeline.generated("claim"),
        "outbox": pipeline.outbox,
        "deleted": pipeline.generated("deleted"),
        "lent": pipeline.generated("lent"),
        "first": pipeline.quoted_key_columns[0],
        "keys": pipeline.key_list,
        "arrays": ", ".join(f"taken.{column}" for column in pipeline.quoted_key_columns),
        "texts": ", ".join(f"array_agg(key.{column}::text) AS {column}" for column in pipeline.quoted_key_columns),
        "longest": _LONGEST_WAIT,
        "is_near": _IS_NEAR,
        "earlier": _EARLIER,
    }
    found = session.query(
        f"SELECT EXISTS (SELECT FROM {names['deleted']}) AS deleted, EXISTS (SELECT FROM {names['lent']}) AS lent"
    )[0]
    if found["lent"]:
        session.query(_FORGET.format(**names), ["bigint"], pipeline.pipeline_id)
    if not found["deleted"]:
        return False
    has_others = len(pipeline.versions) > 1
    noted = int(session.scalar(_NOTE.format(**names))) if has_others else 0
    take = _TAKE.format(**names, is_ready=_SEEN if has_others else f"$2 IS NOT NULL AND {_EARLIER}")
    row = session.query(take, ["integer", "bigint"], _KEYS, pipeline.pipeline_id)[0]
    if not row["row_count"]:
        return noted > 0
    keys = list(zip(*(row[column] or () for column in pipeline.key_columns), strict=True))
    busy = remove_deleted(session, pipeline, keys)
    queue_deleted(session, pipeline, busy, row["enqueued_at"])
    return len(busy) < len(keys)
