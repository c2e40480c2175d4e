"""Take a pipeline's objects off its source around a statement of the user's.

The statement itself runs between the two in the SQL function alter_source, with the rights of its caller: nothing
here runs any text of theirs. What was taken away is kept in the session, for the transaction that did so.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedline.catalog.rights import require_control
from embedline.core.names import trigger
from embedline.core.sql_text import quote_ident
from embedline.errors import NotFound, NotReady
from embedline.pipelines.follow import begin_reshaping, end_reshaping
from embedline.pipelines.plan import source_oid
from embedline.pipelines.reshaping import Reshaping
from embedline.pipelines.state import load_alone
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import bound_lock_wait, retry_locked
from embedline.postgres.session import Session

# In GD: what was taken away, by the number of the source.
_TAKEN = "embedline.taken_away"
_PIPELINES = "SELECT name FROM embedline.pipeline WHERE source = $1::oid ORDER BY pipeline_id"
_LABEL = "SELECT $1::oid::regclass::text"
_TRANSACTION = "SELECT pg_current_xact_id()::text"
# Rows that this transaction has updated in a table and its partitions; NULL where the server does not count.
_UPDATED = """
    SELECT CASE WHEN current_setting('track_counts')::boolean THEN sum(pg_stat_get_xact_tuples_updated(r.relid)) END
    FROM (SELECT $1::oid AS relid UNION SELECT t.relid FROM pg_partition_tree($1::oid::regclass) AS t) AS r
"""


@dataclass(frozen=True)
class _Taken:
    transaction: str
    names: list[str]
    reshaping: Reshaping
    updated: int | None


@entry_point
def take_away(session: Session, source: str) -> None:
    """Take away the objects that would make PostgreSQL refuse the change.

    These are the views, the functions, and the trigger on the source's columns.
    """
    oid = source_oid(session, source)
    label = session.scalar(_LABEL, ["bigint"], oid)
    names = [str(row["name"]) for row in session.query(_PIPELINES, ["bigint"], oid)]
    if not names:
        raise NotFound(f"no pipeline watches {label}", hint="Run the statement by itself.")
    for name in names:
        require_control(session, name)
    bound_lock_wait(session)
    pipelines = [load_alone(session, name, holds_source=False) for name in names]
    # What ALTER TABLE takes anyway. Before all else, as a TRUNCATE does: so neither deadlocks with the other.
    lock = f"LOCK TABLE {label} IN ACCESS EXCLUSIVE MODE"
    retry_locked(session, lambda: session.execute(lock), "the source")
    begin_reshaping(session, names)
    reshaping = Reshaping(session, pipelines)
    taken: dict[int, _Taken] = session.cache.setdefault(_TAKEN, {})
    retry_locked(session, reshaping.take_away, "a view of the source")
    for name in names:
        capture = quote_ident(trigger(name, "update"))
        session.execute(f"DROP TRIGGER IF EXISTS {capture} ON {label}")
    transaction = str(session.scalar(_TRANSACTION))
    taken[oid] = _Taken(transaction, names, reshaping, session.scalar(_UPDATED, ["bigint"], oid))


@entry_point
def put_back(session: Session, source_number: int) -> None:
    """Put back the objects that this transaction has taken off a source.

    They are written for the source as it is now.
    """
    taken: dict[int, _Taken] = session.cache.setdefault(_TAKEN, {})
    found = taken.pop(source_number, None)
    if found is None or found.transaction != session.scalar(_TRANSACTION):
        raise NotReady(
            "nothing was taken away of this source in this transaction",
            hint="SELECT embedline.alter_source('docs', 'ALTER TABLE docs ...');",
        )
    for name in found.names:
        require_control(session, name)
    updated = session.scalar(_UPDATED, ["bigint"], source_number)
    is_counted = updated is not None and found.updated is not None
    found.reshaping.put_back(source_number, reads_again=not is_counted or updated != found.updated)
    end_reshaping(session, found.names)
