"""Take locks: keys of advisory locks, short waits, and the lock holders."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from embedline.core.sql_text import quote_literal
from embedline.errors import (
    NotReady,
)
from embedline.postgres.session import Session, T
from embedline.postgres.sqlstates import LOCK_NOT_AVAILABLE, sqlstate_of

# One attempt at a strong lock, below the delay that a reader notices; then the pause before the next, in seconds.
_LOCK_TRY = "10ms"
_LOCK_PAUSE_SECONDS = (0.01, 0.04)
# Statements that find lock holders: sessions, and transactions prepared for a two-phase commit, which have no session.
_SESSIONS = "SELECT pid, state, xact_start, query FROM pg_stat_activity WHERE state <> 'idle' ORDER BY xact_start;"
_PREPARED = """
    SELECT quote_literal(p.gid) AS gid, p.owner, date_trunc('second', p.prepared)::text AS prepared_at
    FROM pg_prepared_xacts AS p
    WHERE p.database = current_database() AND EXISTS (
        SELECT FROM pg_locks AS x JOIN pg_locks AS l ON l.virtualtransaction = x.virtualtransaction AND l.pid IS NULL
        WHERE x.locktype = 'transactionid' AND x.transactionid = p.transaction AND x.pid IS NULL
            AND l.locktype IN ('relation', 'tuple', 'advisory'))
    ORDER BY p.prepared LIMIT 3
"""
# The keys of all advisory locks are here: four letters of ASCII each.
# First key of every session lock that a resident worker holds ("Embl"). sql/functions/_workers_alive.sql repeats it.
WORKER_LOCK_CLASS = 1164797804
# First key of the lock that makes a worker slot's scheduled jobs exclude each other ("Ems1").
SLOT_LOCK_CLASS = 1164800817
# First key of the transaction lock under which workers claim rows of one pipeline ("Emc1").
CLAIM_LOCK_CLASS = 1164796721
# First key of the transaction lock that writers share and a change of a pipeline's versions takes exclusively ("Emv1").
VERSIONS_LOCK_CLASS = 1164801585
# First key of the session lock for retrying rows that were in flight when a worker died ("Emx1").
SUSPECT_LOCK_CLASS = 1164802097
# First key of the ledger's locks ("Eml1"); the second tells reserving from rolling up.
LEDGER_LOCK_CLASS = 1164799025
# First key of the session lock by which index builds on one table exclude each other ("Emi1"); the second is the table's oid.
BUILD_LOCK_CLASS = 1164798257
# Key of the session lock of the nightly run ("Emn1").
NIGHTLY_LOCK = 1164799537
# Key of the transaction lock of the session that moves old batches into their sums ("Emh1").
HISTORY_LOCK = 1164798001
# Key of the transaction lock of the session that notes since when alerts stand ("Ema1").
# sql/functions/_note_alerts.sql repeats it.
ALERTS_LOCK = 1164796209
# First key of the session lock under which one session at a time checks the quality of a pipeline ("Emy1").
QUALITY_LOCK_CLASS = 1164802353
# First key of the transaction lock under which one session at a time packs a keyword index ("Emk1").
# The second is a hash of the table's name.
KEYWORD_LOCK_CLASS = 1164798769
# First key of the transaction lock of sessions that compute derived vectors ("Emd1"); the second is their id.
DERIVED_LOCK_CLASS = 1164796977
# First key of the session lock of the worker that deals with a provider's batch ("Emb1"); the second is its number.
PROVIDER_BATCH_LOCK_CLASS = 1164796465
# First keys of the locks that tell which version a statement works on ("Emq1"), and at which step it is ("Emp1").
VERSION_LOCK_CLASS, STEP_LOCK_CLASS = 1164800305, 1164800049


def retry_locked(session: Session, work: Callable[[], T], what: str, seconds: float = 10.0) -> T:
    """Do work that needs a strong lock, in short attempts; return its result.

    A wait for a strong lock delays every later request for that lock. Each attempt therefore waits a few milliseconds
    only, and its other locks are released with it. Raises NotReady after `seconds`; the error names `what`.
    """
    before = session.scalar("SELECT current_setting('lock_timeout')")
    deadline = time.monotonic() + seconds
    while True:
        try:
            with session.plpy.subtransaction():
                session.execute(f"SET LOCAL lock_timeout = '{_LOCK_TRY}'")
                result = work()
            session.execute(f"SET LOCAL lock_timeout = {quote_literal(str(before))}")
            return result
        except Exception as error:
            if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
                raise
        if time.monotonic() > deadline:
            raise NotReady(
                f"{what} is in use by other transactions all the time",
                hint=f"{lock_holders(session)} Then run it again.",
            )
        session.execute(f"SELECT pg_sleep({random.uniform(*_LOCK_PAUSE_SECONDS):.3f})")


def lock_holders(session: Session) -> str:
    """Return a hint that finds the sessions and transactions that may hold a lock.

    A prepared transaction has no session and no row in pg_stat_activity. It holds its locks until it is committed or
    rolled back, so the hint names each of them.
    """
    prepared = session.query(_PREPARED)
    hint = f"Wait for the sessions that this shows: {_SESSIONS}"
    if not prepared:
        return hint
    named = " ".join(
        f"COMMIT PREPARED {row['gid']}; or ROLLBACK PREPARED {row['gid']}; ends the one of {row['owner']}, prepared at"
        f" {row['prepared_at']}."
        for row in prepared
    )
    return f"Prepared transactions hold locks: SELECT * FROM pg_prepared_xacts; lists them. {named} {hint}"


def change_versions(session: Session, pipeline_id: int) -> None:
    """Lock a pipeline's versions for this transaction alone.

    Writes of workers end before it, and begin again after it.
    """
    retry_locked(
        session,
        lambda: session.query(
            "SELECT pg_advisory_xact_lock($1, $2)", ["integer", "integer"], VERSIONS_LOCK_CLASS, pipeline_id
        ),
        "the pipeline",
        30.0,
    )


def hold_source(session: Session, source_oid: int) -> None:
    """Lock a pipeline's source as readers do, until the end of the transaction.

    The source must be locked before any other object of the pipeline. TRUNCATE locks the source first, then the
    generated tables. A session that took them in the other order would block it or deadlock with it.
    """
    name = session.scalar("SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], source_oid)
    if name is None:
        return
    retry_locked(session, lambda: session.execute(f"LOCK TABLE ONLY {name} IN ROW SHARE MODE"), "the source")


def live_workers(session: Session) -> list[int]:
    """Return the ids of the workers whose session lock is held.

    Only the claims of these workers count.
    """
    rows = session.query(
        """
        SELECT objid::bigint AS worker_id FROM pg_locks
        WHERE locktype = 'advisory' AND classid = $1::bigint::oid AND objsubid = 2 AND granted
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        """,
        ["bigint"],
        WORKER_LOCK_CLASS,
    )
    return [int(row["worker_id"]) for row in rows]


def bound_lock_wait(session: Session) -> None:
    # A waiting CREATE TRIGGER makes every later write wait behind it, so it fails instead and is run again.
    session.execute("SELECT set_config('lock_timeout', '5s', true) WHERE current_setting('lock_timeout') = '0'")
