"""The backfill: rows older than their triggers, read by block range.

A sweep closes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedline.catalog.values import Pipeline
from embedline.core.retry import MAX_CRASHES, ROWS_PER_CLAIM_AFTER_CRASHES
from embedline.postgres.claims import Claims
from embedline.postgres.rollback import read_and_release
from embedline.postgres.session import Session
from embedline.queue.claim import Claim
from embedline.queue.outbox import ClaimedRow, Key, in_flight_query, key_columns

# Rows that one closing sweep queues at most.
_SWEEP_ROWS = 100_000
# Blocks of a range. 128 are 1 MB: the work of one claim, and 1,000 ranges for a table of 1 GB.
_BLOCKS_PER_RANGE = 128
# Ranges of the source's relations: of all if $3 is NULL, else of that relation and of those that have no range.
_INSERT_RANGES = """
    INSERT INTO embedline.backfill_range (pipeline_id, relation, file_node, next_tid, end_tid)
    SELECT $1, c.oid, pg_relation_filenode(c.oid), format('(%s,0)', b)::tid, format('(%s,0)', least(b + $4, size.blocks))::tid
    FROM (
        SELECT $2::oid AS relid UNION SELECT relid FROM pg_partition_tree($2::oid::regclass) WHERE isleaf
    ) AS leaf
    JOIN pg_class AS c ON c.oid = leaf.relid AND c.relkind = 'r'
    CROSS JOIN LATERAL (
        SELECT pg_relation_size(c.oid) / current_setting('block_size')::bigint AS blocks) AS size
    CROSS JOIN LATERAL generate_series(0, size.blocks - 1, $4) AS b
    WHERE $3 IS NULL OR c.oid = $3::oid OR NOT EXISTS (
        SELECT FROM embedline.backfill_range AS r WHERE r.pipeline_id = $1 AND r.relation = c.oid)
"""


def insert_ranges(session: Session, pipeline_id: int, source_oid: int, relation: int | None = None) -> None:
    """Write a row for each range of blocks that the source has now.

    Of all relations, or of one and those without any.
    """
    session.query(_INSERT_RANGES, ["bigint"] * 4, pipeline_id, source_oid, relation, _BLOCKS_PER_RANGE)


def delete_ranges(session: Session, pipeline_id: int) -> None:
    """Remove all ranges of a pipeline."""
    session.query("DELETE FROM embedline.backfill_range WHERE pipeline_id = $1", ["bigint"], pipeline_id)


def claim_range(
    session: Session, pipeline: Pipeline, limit: int, claims: Claims, live: list[int], *, crash_count: int = 0
) -> Claim | None:
    """Claim the next rows of an open range; None if no range is open and free.

    The claimed range is no longer than its rows: the rest of a longer one stays open. Rows that one of the `live` workers has
    in flight for a change are left to it, so that no text is paid for twice.
    """
    while True:
        rows = session.query(
            """
            SELECT r.range_id, r.relation::oid::bigint AS relation, r.next_tid::text AS next_tid, r.end_tid::text AS end_tid,
                r.crash_count, r.file_node = pg_relation_filenode(r.relation) AS unmoved
            FROM embedline.backfill_range AS r
            WHERE r.pipeline_id = $1 AND NOT r.done AND r.claimed_by IS NULL AND least(r.crash_count, $3) = $2
            ORDER BY r.range_id
            LIMIT 1
            FOR UPDATE SKIP LOCKED
            """,
            ["bigint", "smallint", "smallint"],
            pipeline.pipeline_id,
            crash_count,
            MAX_CRASHES,
        )
        if not rows:
            return None
        row = rows[0]
        if row["unmoved"]:
            if crash_count:
                limit = min(limit, ROWS_PER_CLAIM_AFTER_CRASHES.get(crash_count, 1))
            found, last_tid = _read_range(session, pipeline, row, limit)
            keys = _free_keys(session, pipeline, found, live)
            range_id = _mark(session, row, last_tid if len(found) == limit else None, claims)
            if claims.is_resident:
                show_keys(session, pipeline, range_id, keys)
            claimed = [ClaimedRow(key, crash_count=crash_count) for key in keys]
            return Claim(claimed, of_backfill=True, is_suspect=crash_count > 0, range_id=range_id)
        _restart_ranges(session, pipeline, int(row["relation"]))


def _read_range(
    session: Session, pipeline: Pipeline, row: Mapping[str, Any], limit: int
) -> tuple[list[Key], str | None]:
    """Return up to `limit` keys from the front of a range, and the last place."""
    keys = ", ".join(f"array_agg(r.{column}::text) AS {column}" for column in pipeline.quoted_key_columns)
    found = session.query(
        f"SELECT max(r.row_tid)::text AS last_tid, {keys}"
        f" FROM {pipeline.generated('range')}($1::bigint::oid::regclass, $2::tid, $3::tid, $4) AS r",
        ["bigint", "text", "text", "integer"],
        row["relation"],
        row["next_tid"],
        row["end_tid"],
        limit,
    )[0]
    return list(zip(*(found[column] or () for column in pipeline.key_columns), strict=True)), found["last_tid"]


def _free_keys(session: Session, pipeline: Pipeline, keys: list[Key], live: list[int]) -> list[Key]:
    """Return the keys that no living worker has in flight."""
    if not keys or not live:
        return keys
    count = len(pipeline.key_columns)
    busy = session.scalar(
        f"SELECT array_agg(k.place) FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, place)"
        f" WHERE ({pipeline.key_list_of('k')}) IN ({in_flight_query(pipeline, f'${count + 1}')})",
        [*pipeline.key_parameter_types, "integer[]"],
        *key_columns(keys, count),
        live,
    )
    places = set(busy or ())
    return [key for place, key in enumerate(keys, 1) if place not in places]


def show_keys(session: Session, pipeline: Pipeline, range_id: int, keys: Sequence[Key]) -> None:
    """Show other claims the keys of a claimed range that are in flight."""
    session.query(
        "UPDATE embedline.backfill_range SET keys = $2 WHERE range_id = $1",
        ["bigint", "text[]"],
        range_id,
        key_columns(keys, len(pipeline.key_columns)) if keys else None,
    )


def _mark(session: Session, row: Mapping[str, Any], last_tid: str | None, claims: Claims) -> int:
    """Mark a range as claimed up to `last_tid`, or all of it.

    Return the id of what is claimed. The claimed part of a longer range becomes a range of its own, so that the next batch
    can follow while this one is embedded. The rest of a range that was in a crash stays suspected; only rows that are tried
    alone are given up.
    """
    if last_tid is None:
        session.query(
            "UPDATE embedline.backfill_range SET claimed_by = $2 WHERE range_id = $1",
            ["bigint", "integer"],
            row["range_id"],
            claims.worker_id,
        )
        return int(row["range_id"])
    block, offset = last_tid.strip("()").split(",")
    return int(
        session.scalar(
            """
            WITH rest AS (
                UPDATE embedline.backfill_range SET next_tid = $2::tid, crash_count = least(crash_count, $5)
                WHERE range_id = $1 RETURNING pipeline_id, relation, file_node
            )
            INSERT INTO embedline.backfill_range (pipeline_id, relation, file_node, next_tid, end_tid, claimed_by, crash_count)
            SELECT rest.pipeline_id, rest.relation, rest.file_node, r.next_tid, $2::tid, $3, $4
            FROM rest CROSS JOIN (SELECT next_tid FROM embedline.backfill_range WHERE range_id = $1) AS r
            RETURNING range_id
            """,
            ["bigint", "text", "integer", "smallint", "smallint"],
            row["range_id"],
            f"({block},{int(offset) + 1})",
            claims.worker_id,
            row["crash_count"],
            MAX_CRASHES - 1,
        )
    )


def _restart_ranges(session: Session, pipeline: Pipeline, relation: int) -> None:
    """Recreate the ranges of a relation, and of relations without any.

    VACUUM FULL, CLUSTER, TRUNCATE and some ALTER TABLE rewrite a table: every row has moved. A relation that does not
    belong to the source was detached or dropped. Or the ranges come from a restored database, whose numbers mean
    nothing here; then no relation has any.
    """
    # In a statement of its own, so that the next one sees the relation without ranges.
    session.query(
        "DELETE FROM embedline.backfill_range WHERE pipeline_id = $1 AND relation = $2::oid",
        ["bigint", "bigint"],
        pipeline.pipeline_id,
        relation,
    )
    insert_ranges(session, pipeline.pipeline_id, pipeline.source_oid, relation)


def finish_range(session: Session, range_id: int, claims: Claims) -> None:
    """Mark a claimed range as read, fenced by the claim."""
    session.query(
        "UPDATE embedline.backfill_range SET done = true, claimed_by = NULL, keys = NULL, crash_count = 0"
        f" WHERE range_id = $1{claims.fence(2)}",
        ["bigint", *claims.types],
        range_id,
        *claims.values,
    )


def reclaim_from_dead_workers(session: Session, pipeline: Pipeline, dead: list[int]) -> None:
    """Free ranges that were in flight when their worker died."""
    session.query(
        "UPDATE embedline.backfill_range SET claimed_by = NULL, keys = NULL, crash_count = crash_count + 1"
        " WHERE pipeline_id = $1 AND claimed_by = ANY ($2)",
        ["bigint", "integer[]"],
        pipeline.pipeline_id,
        dead,
    )


def release(session: Session, pipeline: Pipeline, worker_id: int, range_id: int | None = None) -> None:
    """Free all ranges of a worker, or one of them."""
    session.query(
        "UPDATE embedline.backfill_range SET claimed_by = NULL, keys = NULL"
        " WHERE pipeline_id = $1 AND claimed_by = $2 AND ($3 IS NULL OR range_id = $3)",
        ["bigint", "integer", "bigint"],
        pipeline.pipeline_id,
        worker_id,
        range_id,
    )


def _merge_ranges(session: Session, pipeline: Pipeline) -> None:
    """Merge the ranges of each relation, one for each batch by now, into one."""
    session.query(
        """
        WITH gone AS (DELETE FROM embedline.backfill_range WHERE pipeline_id = $1 RETURNING *)
        INSERT INTO embedline.backfill_range (pipeline_id, relation, file_node, next_tid, end_tid, done)
        SELECT pipeline_id, relation, file_node, min(next_tid), max(end_tid), true FROM gone
        GROUP BY pipeline_id, relation, file_node
        """,
        ["bigint"],
        pipeline.pipeline_id,
    )


def missing_keys(session: Session, pipeline: Pipeline, limit: int) -> list[list[str]]:
    """Return keys of rows that are missing and not queued.

    A list for each key column, or none.
    """
    columns = ", ".join(
        f"array_agg(m.{column}::text) AS key_{i}" for i, column in enumerate(pipeline.quoted_key_columns)
    )
    query = f"SELECT {columns} FROM {pipeline.missing_rows()} AS m"
    values = (limit, pipeline.recipe, pipeline.version.vectors_valid_from, pipeline.altered_at)
    found = read_and_release(session, lambda: session.query(query, ["integer", "integer", "text", "text"], *values))[0]
    return [list(keys) for keys in found.values()] if found["key_0"] else []


def close_backfill(session: Session, pipeline: Pipeline) -> bool:
    """Sweep once all ranges are read.

    Mark the version complete if no row is missing. Return True if the sweep found rows. An update of an unrelated column
    can move a row from a block not yet read to one already read, and is not captured. So the end of the ranges is not the
    end of the backfill. The sweep is one snapshot. It queues every row that is neither embedded as the pipeline is now nor
    queued, by its key: after that the row may move.
    """
    if pipeline.version.state != "backfilling":
        return False
    locked = session.scalar(
        """
        SELECT version_id FROM embedline.version
        WHERE version_id = $1 AND state = 'backfilling'
            AND NOT EXISTS (SELECT FROM embedline.backfill_range WHERE pipeline_id = $2 AND NOT done)
        FOR UPDATE SKIP LOCKED
        """,
        ["bigint", "bigint"],
        pipeline.version.version_id,
        pipeline.pipeline_id,
    )
    if locked is None:
        return False
    # Rows of the backfill that wait for a retry. Not the whole queue: under steady writes that never empties.
    waiting = session.scalar(f"SELECT 1 FROM {pipeline.outbox} WHERE of_backfill LIMIT 1")
    if waiting:
        return False
    missing = missing_keys(session, pipeline, _SWEEP_ROWS)
    if missing:
        session.query(
            f"INSERT INTO {pipeline.outbox} ({pipeline.key_list}, of_backfill)"
            f" SELECT m.*, true FROM unnest({pipeline.key_arrays()}) AS m",
            pipeline.key_parameter_types,
            *missing,
        )
        return True
    session.query(
        "UPDATE embedline.version SET state = 'complete', completed_at = clock_timestamp() WHERE version_id = $1",
        ["bigint"],
        pipeline.version.version_id,
    )
    _merge_ranges(session, pipeline)
    # Without statistics the planner does not choose the index, so they must be there before the first search.
    for table in (pipeline.document, pipeline.chunk, pipeline.vectors):
        session.execute(f"ANALYZE (SKIP_LOCKED) {table}")
    return False


def restart_backfill(session: Session, pipeline: Pipeline) -> None:
    """Have the backfill read the whole source again.

    Rows that are up to date cost no provider request.
    """
    # A range in flight is finished by its worker; to wait for its row could be to wait for a long embed_pending.
    session.query(
        "DELETE FROM embedline.backfill_range WHERE range_id IN ("
        "SELECT range_id FROM embedline.backfill_range WHERE pipeline_id = $1 FOR UPDATE SKIP LOCKED)",
        ["bigint"],
        pipeline.pipeline_id,
    )
    insert_ranges(session, pipeline.pipeline_id, pipeline.source_oid)
    session.query(
        "UPDATE embedline.version SET state = 'backfilling', completed_at = NULL WHERE version_id = $1",
        ["bigint"],
        pipeline.version.version_id,
    )
