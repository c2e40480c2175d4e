"""What is stored of deleted rows: removed once no earlier change waits that could use its vectors.

A DELETE, and an UPDATE of the key, only append the old key. The chunks cannot be seen from then on, because every view and
search joins the live row; chunks that stand under the key of a new row are hidden by a mark (see capture). A text that comes
back under another key takes its vector from them: so they stay until each change is through that was made before or with
the deletion. Times compare the begins of transactions: what one transaction deletes and inserts has one time.
"""

from __future__ import annotations

from embedline.catalog.load import Pipeline
from embedline.documents import documents
from embedline.postgres.session import Session

# Keys whose chunks are removed in one transaction, so that it stays short.
_KEYS = 1000
# After so long they are removed, whatever waits: a provider may be away for days.
_LONGEST_WAIT = "10 minutes"

# $1 is the number of keys. `is_ready` keys wait for nothing of the serving version any more.
_TAKE = """
    WITH oldest AS MATERIALIZED (
        SELECT least(
            (SELECT min(i.enqueued_at) FROM {inbox} AS i),
            (SELECT min(c.enqueued_at) FROM {claim} AS c),
            (SELECT min(o.enqueued_at) FROM {outbox} AS o)) AS enqueued_at
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
# Of versions that embed the new chunks later than the serving one does: lists of chunks since then. $2 is the pipeline.
_SEEN = """
    t.seen_at < coalesce((
        SELECT min(q.enqueued_at) FROM embedline.version_queue AS q JOIN embedline.version AS v USING (version_id)
        WHERE v.pipeline_id = $2 AND q.chunk_ids IS NOT NULL), 'infinity')
"""
_NOTE = """
    WITH oldest AS MATERIALIZED (
        SELECT least(
            (SELECT min(i.enqueued_at) FROM {inbox} AS i),
            (SELECT min(c.enqueued_at) FROM {claim} AS c),
            (SELECT min(o.enqueued_at) FROM {outbox} AS o)) AS enqueued_at
    ), front AS MATERIALIZED (
        SELECT t.ctid AS place FROM {deleted} AS t WHERE t.seen_at IS NULL AND {earlier} FOR UPDATE SKIP LOCKED
    ), noted AS (
        UPDATE {deleted} SET seen_at = clock_timestamp() WHERE ctid = ANY (ARRAY(SELECT f.place FROM front AS f)) RETURNING 1
    )
    SELECT count(*) FROM noted
"""
# What was kept of replaced chunks. Lists of other versions come after the chunks that they ask for: all must be through.
_FORGET = """
    WITH oldest AS MATERIALIZED (
        SELECT least(
            (SELECT min(i.enqueued_at) FROM {inbox} AS i),
            (SELECT min(c.enqueued_at) FROM {claim} AS c),
            (SELECT min(o.enqueued_at) FROM {outbox} AS o)) AS enqueued_at
    )
    DELETE FROM {lent} WHERE ctid = ANY (ARRAY(
        SELECT t.ctid FROM {lent} AS t
        WHERE (t.kept_at < coalesce((SELECT o.enqueued_at FROM oldest AS o), 'infinity') AND NOT EXISTS (
                SELECT FROM embedline.version_queue AS q JOIN embedline.version AS v USING (version_id)
                WHERE v.pipeline_id = $1 AND q.chunk_ids IS NOT NULL))
            OR t.kept_at < clock_timestamp() - interval '{longest}'
        FOR UPDATE SKIP LOCKED))
"""


def remove_some(session: Session, pipeline: Pipeline) -> bool:
    """Remove what is stored of up to 1,000 deleted rows; return True if there may be more to do now.

    One short transaction's work, of the caller's. The source must be held. Waits for no lock of an application.
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
    busy = documents.remove_deleted(session, pipeline, keys)
    documents.queue_deleted(session, pipeline, busy, row["enqueued_at"])
    return len(busy) < len(keys)
