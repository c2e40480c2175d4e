"""Signals: one statement tells which pipelines have work, however many there are.

Triggers of each queue leave a row in embedline.signal, once for each transaction that queues something. A worker reads
these, and peeks into the tables of the pipelines named there alone: with 1,000 pipelines, to peek into all took 600 ms. The
statement that finds nothing removes the signals: a transaction that has committed a signal has committed its rows.

The table is unlogged, so that a signal costs neither WAL nor a place in a publication. A crash of the server, or a failover,
empties it. So one row stands for all others: if a worker begins and does not find it, every pipeline gets a signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embedline.catalog.values import Pipeline, WorkKey
from embedline.postgres.claims import Claims
from embedline.postgres.locks import WORKER_LOCK_CLASS
from embedline.postgres.session import Session

# Signals beyond one for each pipeline above which they are folded. To read as many takes a tenth of a millisecond.
_FOLDED_ABOVE = 500

_LIVE = f"""
    SELECT l.objid::bigint::integer AS worker_id FROM pg_locks AS l
    WHERE l.locktype = 'advisory' AND l.classid = {WORKER_LOCK_CLASS}::bigint::oid AND l.objsubid = 2 AND l.granted
        AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
"""
# `signalled` are pipelines with a signal that is due. `reading` are those with an open backfill of their serving
# version, and `filling` the versions beside it that are filled.
_ASK = f"""
    WITH asked AS MATERIALIZED (
        SELECT clock_timestamp() AS at
    ), live AS MATERIALIZED ({_LIVE}
    ), signalled AS MATERIALIZED (
        SELECT s.pipeline, count(*) AS signal_count FROM embedline.signal AS s
        WHERE s.due_at <= (SELECT at FROM asked) GROUP BY s.pipeline
    ), named AS MATERIALIZED (
        SELECT p.pipeline_id FROM signalled AS s JOIN embedline.pipeline AS p ON p.name = s.pipeline
        WHERE p.state = 'active' AND NOT p.is_resting AND ($2 IS NULL OR p.name = $2)
    ), open AS MATERIALIZED (
        SELECT v.version_id, p.pipeline_id, v.version_id = p.serving_version_id AS is_serving
        FROM embedline.version AS v JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
        WHERE v.state = 'backfilling' AND p.state = 'active' AND NOT p.is_resting AND ($2 IS NULL OR p.name = $2)
    )
    SELECT (SELECT at::text FROM asked) AS asked_at, ARRAY(SELECT worker_id FROM live) AS live,
        (SELECT w.stop_requested FROM embedline.worker AS w WHERE w.worker_id = $1) AS is_to_stop,
        EXISTS (SELECT FROM embedline.worker AS w WHERE w.worker_id NOT IN (SELECT worker_id FROM live)) AS has_dead,
        (SELECT coalesce(sum(signal_count - 1), 0)::bigint FROM signalled) AS surplus,
        ARRAY(SELECT pipeline_id FROM named) AS signalled,
        ARRAY(SELECT pipeline_id FROM open WHERE is_serving) AS reading,
        ARRAY(
            SELECT version_id FROM open WHERE NOT is_serving
            UNION
            SELECT q.version_id FROM embedline.version_queue AS q
            JOIN embedline.version AS v ON v.version_id = q.version_id
            JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
            WHERE p.state = 'active' AND NOT p.is_resting AND ($2 IS NULL OR p.name = $2)
                AND CASE WHEN q.claimed_by IS NULL THEN q.first_id IS NOT NULL OR q.not_before <= (SELECT at FROM asked)
                    ELSE q.claimed_by NOT IN (SELECT worker_id FROM live) END
        ) AS filling
"""
_ALL = """
    SELECT ARRAY(
        SELECT p.pipeline_id FROM embedline.pipeline AS p
        WHERE p.state = 'active' AND NOT p.is_resting AND ($1 IS NULL OR p.name = $1)
    ) AS pipeline_ids
"""
# The row that stands for all others is never due.
_RENEW = """
    INSERT INTO embedline.signal (pipeline, due_at)
    SELECT r.pipeline, r.due_at FROM (
        SELECT p.name AS pipeline, now() AS due_at FROM embedline.pipeline AS p UNION ALL SELECT '', 'infinity'
    ) AS r
    WHERE NOT EXISTS (SELECT FROM embedline.signal AS s WHERE s.due_at = 'infinity')
"""
_FOLD = """
    WITH folded AS (
        DELETE FROM embedline.signal WHERE ctid = ANY (ARRAY(
            SELECT s.ctid FROM embedline.signal AS s WHERE s.due_at <= $1::timestamptz FOR UPDATE SKIP LOCKED))
        RETURNING pipeline
    )
    INSERT INTO embedline.signal (pipeline)
    SELECT DISTINCT f.pipeline FROM folded AS f JOIN embedline.pipeline AS p ON p.name = f.pipeline
"""
_NOTE_DEAD = f"""
    WITH dead AS (
        DELETE FROM embedline.worker AS w WHERE NOT EXISTS (SELECT FROM ({_LIVE}) AS l WHERE l.worker_id = w.worker_id)
        RETURNING w.worker_id
    )
    INSERT INTO embedline.signal (pipeline) SELECT p.name FROM embedline.pipeline AS p WHERE EXISTS (SELECT FROM dead)
"""


@dataclass(frozen=True)
class Asked:
    """The pipelines and versions that may have work now, and living workers.

    `signalled` are ids of pipelines; `keys` has these, open backfills and versions that are filled.
    """

    at: str
    live: list[int]
    is_to_stop: bool
    has_dead: bool
    signalled: list[int]
    keys: list[WorkKey]


def ask(session: Session, claims: Claims, pipeline_name: str | None) -> Asked:
    """Ask which pipelines, of all or the one named, may have something to claim now."""
    row = session.query(_ASK, ["integer", "text"], claims.worker_id, pipeline_name)[0]
    signalled = list(row["signalled"] or ())
    pipelines = dict.fromkeys([*signalled, *(row["reading"] or ())])
    if row["surplus"] > _FOLDED_ABOVE and claims.is_resident:
        # Of a pipeline that is written to all the time, or paused.
        session.query(_FOLD, ["text"], row["asked_at"])
    return Asked(
        at=str(row["asked_at"]),
        live=list(row["live"] or ()),
        is_to_stop=bool(row["is_to_stop"]),
        has_dead=bool(row["has_dead"]),
        signalled=signalled,
        keys=[WorkKey("pipeline", i) for i in pipelines] + [WorkKey("version", i) for i in row["filling"] or ()],
    )


def all_pipelines(session: Session, pipeline_name: str | None) -> list[int]:
    """Return the numbers of all active pipelines, or of the one named."""
    return list(session.scalar(_ALL, ["text"], pipeline_name) or ())


def renew(session: Session) -> None:
    """Give every pipeline a signal if a crash has emptied the table."""
    session.query(_RENEW)


def note_dead_workers(session: Session) -> None:
    """Remove workers that are gone, and give every pipeline a signal.

    The rows that they had in flight are free.
    """
    session.query(_NOTE_DEAD)


def clear(session: Session, pipeline: Pipeline, asked_at: str, live: Sequence[int]) -> None:
    """Remove a pipeline's signals that were due, unless something still waits.

    One statement, hence one snapshot: a transaction whose signal it sees has left its rows there, too. Rows that wait until
    later leave a signal for then.
    """
    outbox = pipeline.outbox
    session.query(
        f"""
        WITH next AS MATERIALIZED (
            -- The first in the index; asked for any that is due, all of a long queue would be read in vain.
            SELECT not_before AS due_at FROM {outbox} WHERE claimed_by IS NULL ORDER BY not_before LIMIT 1
        ), waiting AS MATERIALIZED (
            SELECT EXISTS (SELECT FROM {pipeline.generated("inbox")})
                OR EXISTS (SELECT FROM {pipeline.generated("deleted")}) OR EXISTS (SELECT FROM {pipeline.generated("lent")})
                OR coalesce((SELECT due_at FROM next) <= $2::timestamptz, false)
                OR EXISTS (SELECT FROM {pipeline.generated("claim")} WHERE claimed_by <> ALL ($3))
                OR EXISTS (SELECT FROM {outbox} WHERE claimed_by IS NOT NULL AND claimed_by <> ALL ($3)) AS is_so
        ), gone AS (
            DELETE FROM embedline.signal WHERE ctid = ANY (ARRAY(
                SELECT s.ctid FROM embedline.signal AS s WHERE s.pipeline = $1 AND s.due_at <= $2::timestamptz
                    AND NOT (SELECT is_so FROM waiting) FOR UPDATE SKIP LOCKED))
            RETURNING 1
        )
        INSERT INTO embedline.signal (pipeline, due_at)
        SELECT $1, next.due_at FROM next WHERE EXISTS (SELECT FROM gone)
        """,
        ["text", "text", "integer[]"],
        pipeline.name,
        asked_at,
        list(live),
    )
