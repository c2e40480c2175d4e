"""Read source rows through the generated functions, with their content's hash."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from embedline.catalog.source import hidden_source
from embedline.catalog.values import Pipeline
from embedline.documents.values import ReadRow
from embedline.postgres.rollback import read_and_release
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import LOCK_NOT_AVAILABLE, NOT_OF_A_ROW, sqlstate_of
from embedline.queue.outbox import Key, key_columns

_ALL_BYTES = 1 << 62
Read = Callable[[Sequence[Key]], Mapping[int, ReadRow]]


def read_rows(session: Session, pipeline: Pipeline, keys: Sequence[Key], max_bytes: int) -> dict[int, ReadRow]:
    """Read the content of keys as the source's owner.

    A key without a row is missing from the result.
    """
    count = len(pipeline.key_columns)
    query = f"""
        SELECT r.ordinality, r.accepted, r.deferred, c.current, c.given_up, r.content_hash, r.prefix,
            CASE WHEN NOT c.current THEN r.content END AS content
        FROM {pipeline.generated("read")}({pipeline.key_arrays()}, ${count + 1}) AS r
        LEFT JOIN (
            SELECT k.ordinality, d.state, d.content_hash, d.recipe, d.embedded_at
            FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
            JOIN {pipeline.document} AS d ON {pipeline.key_join("d", "k")}
        ) AS s ON s.ordinality = r.ordinality
        CROSS JOIN LATERAL (
            SELECT r.accepted AND NOT r.deferred AND s.content_hash IS NOT DISTINCT FROM r.content_hash
                AND coalesce(s.recipe = ${count + 2}, true)
                AND coalesce(s.embedded_at >= ${count + 3}::timestamptz, true) AS same
        ) AS m
        CROSS JOIN LATERAL (
            SELECT coalesce(m.same AND s.state = CASE WHEN r.content_hash IS NULL THEN 'empty' ELSE 'embedded' END,
            false) AS current, coalesce(m.same AND s.state = 'dead' AND s.content_hash IS NOT NULL, false) AS given_up
        ) AS c
        """
    values = [*key_columns(keys, count), max_bytes, pipeline.recipe, pipeline.version.vectors_valid_from]
    types = [*pipeline.key_parameter_types, "bigint", "integer", "text"]
    rows = read_and_release(session, lambda: session.query(query, types, *values))
    return {
        row["ordinality"] - 1: ReadRow(
            row["accepted"],
            row["deferred"],
            row["current"],
            row["given_up"],
            row["content"],
            row["content_hash"],
            row["prefix"] or "",
        )
        for row in rows
    }


def still_current(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> set[int]:
    """Return the indexes of the keys whose documents match the source or are dead.

    Documents that another session is writing now are left out. Without the lock that session could be writing an older
    content, which would follow unseen.
    """
    arrays = key_columns(keys, len(pipeline.key_columns))
    locked = session.query(
        f"""
        SELECT k.ordinality FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        JOIN {pipeline.document} AS d ON {pipeline.key_join("d", "k")}
        ORDER BY {pipeline.key_list_of("d")} FOR SHARE OF d SKIP LOCKED
        """,
        pipeline.key_parameter_types,
        *arrays,
    )
    free = {row["ordinality"] - 1 for row in locked}
    marks = hidden_marks(session, pipeline, keys)
    read = read_rows(session, pipeline, keys, _ALL_BYTES)
    current = {index for index, row in read.items() if (row.current or row.given_up) and index in free}
    show_again(session, pipeline, marks, current)
    return current


_ROW_BYTES = """
    SELECT sum(pg_relation_size(c.oid) + 3 * CASE WHEN c.reltoastrelid = 0 THEN 0 ELSE pg_relation_size(c.reltoastrelid)
    END) / nullif(sum(greatest(c.reltuples::double precision, pg_stat_get_live_tuples(c.oid), 0)), 0) AS bytes FROM
    (SELECT $1::oid AS relid UNION SELECT relid FROM pg_partition_tree($1::oid::regclass) WHERE isleaf) AS leaf JOIN
    pg_class AS c ON c.oid = leaf.relid AND c.relkind = 'r'
"""


def can_hold_source(session: Session, pipeline: Pipeline) -> bool:
    """Lock the source as readers do; return False if an application will change it.

    The lock lasts until the end of the transaction. TRUNCATE locks the source first and then our tables. A session that
    locks them in another order deadlocks with it, and the application may be the one that fails. So a worker begins
    each transaction with this lock. It does not wait for an application.
    """
    name = session.scalar("SELECT $1::oid::regclass::text", ["bigint"], pipeline.source_oid)
    try:
        session.execute(f"LOCK TABLE ONLY {name} IN ROW SHARE MODE NOWAIT")
    except Exception as error:
        if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
            raise
        return False
    return True


def likely_row_bytes(session: Session, pipeline: Pipeline) -> float | None:
    """Return the likely bytes of a row of the source, None if they are unknown.

    The estimate takes 0.2 ms on any table. It uses the files' sizes and the counts that VACUUM, ANALYZE and the
    statistics keep. No value is read. Out-of-line values are compressed, texts to about a third.
    """
    size: float | None = session.scalar(_ROW_BYTES, ["bigint"], pipeline.source_oid)
    return size


def hidden_marks(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> dict[int, list[str]]:
    """Lock the marks that hide the chunks of keys.

    Returns their places, by index of the key. The marks must be collected before the source is read. A later mark
    belongs to a row which that read did not see, and its chunks must stay hidden.
    """
    hidden = pipeline.generated("hidden")
    if not session.scalar(f"SELECT EXISTS (SELECT FROM {hidden})"):
        return {}
    rows = session.query(
        f"""
        SELECT k.ordinality, h.ctid::text AS place
        FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        JOIN {hidden} AS h ON {pipeline.key_join("h", "k")} FOR UPDATE OF h SKIP LOCKED
        """,
        pipeline.key_parameter_types,
        *key_columns(keys, len(pipeline.key_columns)),
    )
    marks: dict[int, list[str]] = {}
    for row in rows:
        marks.setdefault(int(row["ordinality"]) - 1, []).append(row["place"])
    return marks


def show_again(session: Session, pipeline: Pipeline, marks: Mapping[int, list[str]], indexes: Collection[int]) -> None:
    """Remove marks, because the chunks of these keys are those of their rows."""
    places = [place for index in indexes for place in marks.get(index, ())]
    if places:
        hidden = pipeline.generated("hidden")
        session.query(f"DELETE FROM {hidden} WHERE ctid = ANY ($1::text[]::tid[])", ["text[]"], places)


def read_contents(session: Session, pipeline: Pipeline, keys: Sequence[Key], max_bytes: int) -> dict[int, ReadRow]:
    """Read the content of keys as the source's owner.

    It is read whether or not it is embedded already. A key without a row, and one whose row the filter refuses, is
    missing from the result.
    """
    query = f"""
        SELECT r.ordinality, r.deferred, r.content, r.content_hash, r.prefix
        FROM {pipeline.generated("read")}({pipeline.key_arrays()}, ${len(pipeline.key_columns) + 1}) AS r WHERE
        r.accepted
    """
    values = [*key_columns(keys, len(pipeline.key_columns)), max_bytes]
    types = [*pipeline.key_parameter_types, "bigint"]
    rows = read_and_release(session, lambda: session.query(query, types, *values))
    return {
        row["ordinality"] - 1: ReadRow(
            True, row["deferred"], False, False, row["content"], row["content_hash"], row["prefix"] or ""
        )
        for row in rows
    }


def read_isolated(
    session: Session, pipeline: Pipeline, keys: Sequence[Key], read: Read
) -> tuple[dict[int, ReadRow], dict[int, Exception]]:
    """Return the rows of keys, and the errors of keys whose expression raises.

    Both are by index of the key. A failed read is tried again by halves until each such key stands alone. Raises an error
    that is no row's, such as that of a source whose rows are hidden.
    """
    found: dict[int, ReadRow] = {}
    failed: dict[int, Exception] = {}
    parts = [(0, len(keys))] if keys else []
    while parts:
        first, last = parts.pop()
        try:
            part = read(keys[first:last])
        except Exception as error:
            if sqlstate_of(error)[:2] in NOT_OF_A_ROW:
                raise
            if (hidden := hidden_source(session, pipeline.source_oid)) is not None:
                raise hidden from error  # A fault of the whole source, since the claim.
            if last - first == 1:
                failed[first] = error
            else:
                middle = (first + last) // 2
                parts += [(middle, last), (first, middle)]
        else:
            found |= {first + index: row for index, row in part.items()}
    return found, failed
