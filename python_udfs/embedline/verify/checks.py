"""Check a pipeline: each check finds, and can repair, one kind of difference."""

from __future__ import annotations

from collections.abc import Sequence

from embedline.catalog.keys import as_json, from_json, not_queued
from embedline.catalog.load import load_versions
from embedline.catalog.source import hidden_source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.errors import NotFound
from embedline.postgres.rollback import read_and_release
from embedline.postgres.session import Session
from embedline.queue import chunk_queue, coverage
from embedline.queue.backfill import missing_keys, restart_backfill
from embedline.queue.inbox import enqueue_query
from embedline.verify.findings import Finding, make_finding

# Rows up to which a repair uses the queue. More of them would delay live changes, so they are left to a new pass of the
# backfill, which yields to live changes.
QUEUED_ROWS = 10_000
_CAPTURE_EVENTS = ["insert", "update", "delete", "truncate"]


def require_source(session: Session, pipeline: Pipeline) -> None:
    if session.scalar("SELECT 1 FROM pg_class WHERE oid = $1::oid", ["bigint"], pipeline.source_oid) is None:
        raise NotFound(
            f'the source of pipeline "{pipeline.name}" is gone',
            hint=f"SELECT embedline.move_pipeline('{pipeline.name}', 'another_table'); or"
            f" SELECT embedline.drop_pipeline('{pipeline.name}');",
        )
    hidden = hidden_source(session, pipeline.source_oid)
    if hidden is not None:
        raise hidden


def capture_off(session: Session, pipeline: Pipeline) -> list[Finding]:
    """Find capture triggers that are gone or disabled.

    They are the cause of most other findings.
    """
    rows = session.query(
        """
        WITH found AS (
            SELECT w.name, t.tgenabled, coalesce(bool_or(t.tgenabled = 'A') OVER (), false) AS always
            FROM unnest($3::text[]) AS w (name)
            LEFT JOIN pg_trigger AS t ON t.tgrelid = $1::oid AND t.tgname = 'embedline_' || $2 || '_' || w.name
        )
        SELECT f.name, f.tgenabled IS NULL AS gone, f.always FROM found AS f
        -- A trigger that was made to fire in replica mode is off there if it fires only in the other modes.
        WHERE coalesce(f.tgenabled, 'D') IN ('D', 'R') OR (f.always AND f.tgenabled = 'O')
        """,
        ["bigint", "text", "text[]"],
        pipeline.source_oid,
        pipeline.name,
        _CAPTURE_EVENTS,
    )
    if not rows:
        return _statement_triggers_of_a_part(session, pipeline)
    table = session.scalar("SELECT $1::oid::regclass::text", ["bigint"], pipeline.source_oid)
    trigger = names.trigger(pipeline.name, str(rows[0]["name"]))
    remedy = (
        f"the trigger {trigger} is gone: drop the pipeline and create it again"
        if rows[0]["gone"]
        else f"ALTER TABLE {table} ENABLE {'ALWAYS ' if rows[0]['always'] else ''}TRIGGER {trigger};"
    )
    return [Finding("capture_off", len(rows), 0, {"trigger": trigger, "hint": remedy})]


def _statement_triggers_of_a_part(session: Session, pipeline: Pipeline) -> list[Finding]:
    """Find a source that became a part of another table unnoticed.

    Its statement triggers do not fire on a write through that table.
    """
    blind = session.scalar(
        "SELECT EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = p.source) FROM embedline.pipeline AS p"
        " WHERE p.pipeline_id = $1 AND p.capture = 'statement'",
        ["bigint"],
        pipeline.pipeline_id,
    )
    if not blind:
        return []
    remedy = f"SELECT embedline.refresh_pipeline('{pipeline.name}');"
    return [Finding("capture_off", 2, 0, {"trigger": names.trigger(pipeline.name, "insert"), "hint": remedy})]


def against_source(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find rows without a document, or with an outdated one.

    A document is outdated if it does not match the row's content, filter and recipe. While the version is being filled
    they are counted as pending, because the backfill will reach them.
    """
    columns = [f"k.{column}" for column in pipeline.quoted_key_columns]
    query = f"""
        WITH found AS MATERIALIZED (
            SELECT CASE WHEN v.state = 'complete' THEN a.finding ELSE 'pending' END AS finding,
                {pipeline.key_list_of("a")}
            FROM embedline.version AS v CROSS JOIN LATERAL {pipeline.generated("audit")}($2, v.vectors_valid_from) AS a
            WHERE v.version_id = $1
        ), tally AS (
            SELECT f.finding, count(*) AS count FROM found AS f GROUP BY f.finding
        ), wanted AS (
            SELECT coalesce(sum(t.count), 0) AS count FROM tally AS t WHERE t.finding <> 'pending'
        ), doomed AS (
            SELECT {", ".join(f"array_agg({column}::text) AS key_{i}" for i, column in enumerate(columns))} FROM found AS k
            WHERE k.finding <> 'pending' AND $3 AND (SELECT w.count FROM wanted AS w) <= $4
        )
        SELECT t.finding, t.count, d.*,
            (SELECT {as_json(pipeline, "f")} FROM found AS f WHERE f.finding = t.finding LIMIT 1) AS example
        FROM tally AS t LEFT JOIN doomed AS d ON t.finding = (SELECT min(other.finding) FROM tally AS other)
        """
    values = (pipeline.version.version_id, pipeline.recipe, repair, QUEUED_ROWS)
    types = ("bigint", "integer", "boolean", "bigint")
    rows = read_and_release(session, lambda: session.query(query, types, *values))
    found = [make_finding(row) for row in rows]
    wanted = [finding for finding in found if finding.name != "pending"]
    keys = next(([row[f"key_{i}"] for i in range(len(columns))] for row in rows if row["key_0"]), [])
    _queue(session, pipeline, keys)
    if repair and wanted and not keys:
        restart_backfill(session, pipeline)
    return [
        Finding(
            finding.name, finding.count, (finding.count or 0) if repair and finding in wanted else 0, finding.example
        )
        for finding in found
    ]


def _queue(session: Session, pipeline: Pipeline, keys: Sequence[Sequence[str]]) -> None:
    """Queue keys as an application's write does.

    They are given as a list for each key column.
    """
    if keys:
        given = f"unnest({pipeline.key_arrays()}) AS given ({pipeline.key_list})"
        session.query(enqueue_query(pipeline, given), pipeline.key_parameter_types, *map(list, keys))


def chunks(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find documents that lack a chunk or a vector, and chunks without a document.

    Chunks of a document that must have none are found, too. A repair marks the document with a hash that no content
    has. So the worker writes it again although its content is the same, and identical chunks lend their vectors as
    always.

    A chunk without a vector is never one that a worker is about to complete, because both are written in one
    transaction. Keys without a document are always queued, and the worker removes their remains.
    """
    # After a cutover the version may lack chunks whose dead letters were accepted.
    given_up = (
        "EXISTS (SELECT FROM embedline.version_dead_letter AS l"
        f" WHERE l.version_id = {pipeline.version.version_id} AND l.chunk_id = c.chunk_id)"
    )
    bare = f"NOT EXISTS (SELECT FROM {pipeline.vectors} AS v WHERE v.chunk_id = c.chunk_id) AND NOT {given_up}"
    keys = ", ".join(
        f"coalesce(s.{quote_ident(key)}, d.{quote_ident(key)}) AS {quote_ident(key)}" for key in pipeline.key_columns
    )
    rows = session.query(
        f"""
        WITH stored AS (
            SELECT {pipeline.key_list_of("c")}, count(*) AS chunks,
                count(*) FILTER (WHERE v.chunk_id IS NOT NULL OR {given_up}) AS vectors, max(c.seq) AS last_seq
            FROM {pipeline.chunk} AS c LEFT JOIN {pipeline.vectors} AS v ON v.chunk_id = c.chunk_id
            GROUP BY {pipeline.key_list_of("c")}
        ), joined AS (
            SELECT {keys}, d.state, d.embedded_at, s.chunks, s.vectors, s.last_seq
            FROM stored AS s FULL JOIN {pipeline.document} AS d ON {pipeline.key_join("s", "d")}
        ), bad AS MATERIALIZED (
            SELECT {pipeline.key_list_of("j")}, j.embedded_at,
                CASE WHEN j.state = 'embedded' THEN 'missing_vector' ELSE 'orphaned' END AS finding
            FROM joined AS j
            WHERE CASE WHEN j.state = 'embedded'
                    THEN j.chunks IS NULL OR j.vectors <> j.chunks OR j.chunks <> j.last_seq + 1
                    ELSE j.chunks IS NOT NULL END
                AND {not_queued(pipeline, "j")}
        ), bare AS MATERIALIZED (
            SELECT c.chunk_id FROM {pipeline.chunk} AS c JOIN bad AS b ON {pipeline.key_join("b", "c")}
            WHERE $1 AND {bare} FOR UPDATE OF c SKIP LOCKED
        ), removed AS (
            DELETE FROM {pipeline.chunk} AS c USING bare WHERE c.chunk_id = bare.chunk_id
        ), locked AS MATERIALIZED (
            -- Written again since the snapshot: that was the repair.
            SELECT {pipeline.key_list_of("d")} FROM {pipeline.document} AS d JOIN bad AS b ON {pipeline.key_join("b", "d")}
            WHERE $1 AND d.embedded_at = b.embedded_at FOR UPDATE OF d SKIP LOCKED
        ), marked AS (
            UPDATE {pipeline.document} AS d SET content_hash = '' FROM locked AS l WHERE {pipeline.key_join("l", "d")}
        ), queued AS (
            {enqueue_query(pipeline, "bad", "$1 AND (embedded_at IS NULL OR (SELECT count(*) FROM bad) <= $2)")}
        )
        SELECT b.finding, count(*) AS count, CASE WHEN $1 THEN count(*) ELSE 0 END AS repaired,
            (SELECT {as_json(pipeline, "e")} FROM bad AS e WHERE e.finding = b.finding LIMIT 1) AS example
        FROM bad AS b GROUP BY b.finding
        """,
        ["boolean", "bigint"],
        repair,
        QUEUED_ROWS,
    )
    findings = [make_finding(row) for row in rows]
    if repair and sum(finding.count or 0 for finding in findings) > QUEUED_ROWS:
        restart_backfill(session, pipeline)
    return findings


def other_versions(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find chunks that a version beside the serving one lacks.

    Its backfill is complete, and nothing of them is queued.
    """
    findings = []
    for other in load_versions(session, pipeline.name):
        if other.is_serving or other.version.state != "complete":
            continue
        if repair:
            chunk_queue.forget_dead_letters(session, other)
        missing = coverage.missing_chunks(session, other)
        if missing:
            queued = chunk_queue.enqueue_missing(session, other) if repair else 0
            findings.append(Finding("missing_vector", missing, queued, {"version": other.version.number}))
    return findings


def gone(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find documents whose row is gone; remove them with their chunks and vectors.

    The document rows are locked first, and only then is the source read again, so no worker can write in between. A
    worker could still take a row that returns at this very moment for unchanged. The closing read finds it.
    """
    arrays = ", ".join(f"array_agg(l.{quote_ident(key)}) AS {quote_ident(key)}" for key in pipeline.key_columns)
    gone_chunks = "".join(
        f""", gone_chunk_{number} AS (
            DELETE FROM {table} AS t USING doomed AS x WHERE {pipeline.key_join("x", "t")}
        )"""
        for number, table in enumerate((*pipeline.chunk_tables, pipeline.generated("hidden")))
    )
    rows = session.query(
        f"""
        WITH gone AS MATERIALIZED (
            SELECT * FROM {pipeline.generated("gone")}()
        ), locked AS MATERIALIZED (
            SELECT {pipeline.key_list_of("d")} FROM {pipeline.document} AS d JOIN gone AS g ON {pipeline.key_join("g", "d")}
            WHERE $1 AND d.embedded_at = g.embedded_at FOR UPDATE OF d SKIP LOCKED
        ), batch AS (
            SELECT {arrays} FROM (SELECT *, row_number() OVER () AS embedline_row FROM locked) AS l
            GROUP BY (l.embedline_row - 1) / 1000
        ), present AS MATERIALIZED (
            SELECT p.* FROM batch AS b
            CROSS JOIN LATERAL {pipeline.generated("present")}({pipeline.key_list_of("b")}) AS p ({pipeline.key_list})
        ), doomed AS MATERIALIZED (
            SELECT * FROM locked AS l WHERE NOT EXISTS (SELECT FROM present AS p WHERE {pipeline.key_join("p", "l")})
        ){gone_chunks}, gone_document AS (
            DELETE FROM {pipeline.document} AS t USING doomed AS x WHERE {pipeline.key_join("x", "t")} RETURNING 1
        )
        SELECT 'orphaned' AS finding, count(*) AS count, (SELECT count(*) FROM gone_document) AS repaired,
            (SELECT {as_json(pipeline, "e")} FROM gone AS e LIMIT 1) AS example
        FROM gone
        """,
        ["boolean"],
        repair,
    )
    finding = make_finding(rows[0])
    if finding.repaired:
        is_complete = session.scalar(
            "SELECT state = 'complete' FROM embedline.version WHERE version_id = $1",
            ["bigint"],
            pipeline.version.version_id,
        )
        _queue(session, pipeline, missing_keys(session, pipeline, QUEUED_ROWS) if is_complete else [])
    return [finding] if finding.count else []


def hidden(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find keys whose chunks are hidden although no change of them is queued.

    A mark and its change are written and settled together.
    """
    rows = session.query(
        f"""
        WITH stray AS MATERIALIZED (
            SELECT DISTINCT {pipeline.key_list_of("h")} FROM {pipeline.generated("hidden")} AS h
            WHERE {not_queued(pipeline, "h")}
        ), queued AS (
            {enqueue_query(pipeline, "stray", "$1")}
        )
        SELECT 'hidden' AS finding, count(*) AS count, CASE WHEN $1 THEN count(*) ELSE 0 END AS repaired,
            (SELECT {as_json(pipeline, "e")} FROM stray AS e LIMIT 1) AS example
        FROM stray
        """,
        ["boolean"],
        repair,
    )
    finding = make_finding(rows[0])
    return [finding] if finding.count else []


def dead_letters(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find dead letters of rows that are gone or embedded.

    A TRUNCATE leaves one that another transaction has locked.
    """
    rows = session.query(
        f"""
        WITH letter AS (
            SELECT l.dead_letter_id, l.key, {from_json(pipeline, "l.key")}
            FROM embedline.dead_letter AS l WHERE l.pipeline_id = $1
        ), stray AS MATERIALIZED (
            SELECT l.dead_letter_id, l.key FROM letter AS l
            WHERE NOT EXISTS (
                    SELECT FROM {pipeline.document} AS d WHERE {pipeline.key_join("d", "l")} AND d.state = 'dead')
                AND {not_queued(pipeline, "l")}
        ), locked AS MATERIALIZED (
            SELECT t.dead_letter_id FROM embedline.dead_letter AS t JOIN stray AS s USING (dead_letter_id)
            WHERE $2 FOR UPDATE OF t SKIP LOCKED
        ), removed AS (
            DELETE FROM embedline.dead_letter AS t USING locked AS l WHERE t.dead_letter_id = l.dead_letter_id RETURNING 1
        )
        SELECT 'dead_letter' AS finding, count(*) AS count, (SELECT count(*) FROM removed) AS repaired,
            (SELECT s.key FROM stray AS s LIMIT 1) AS example
        FROM stray
        """,
        ["bigint", "boolean"],
        pipeline.pipeline_id,
        repair,
    )
    finding = make_finding(rows[0])
    return [finding] if finding.count else []
