"""Move a pipeline to a table that takes its source's place."""

from __future__ import annotations

from embedline.catalog.rights import caller, require_control
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.pipelines.changed_keys import KeySwap
from embedline.pipelines.ddl.plan import KeyColumn
from embedline.pipelines.follow import accept_source, being_reshaped
from embedline.pipelines.plan import load_source, source_oid
from embedline.pipelines.reshaping import Reshaping
from embedline.pipelines.state import load_alone
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import bound_lock_wait, retry_locked
from embedline.postgres.session import Session
from embedline.queue.inbox import enqueue_query

_TRIGGERS = """
    SELECT format('DROP TRIGGER %I ON %s', t.tgname, t.tgrelid::regclass) AS statement FROM pg_trigger AS t
    WHERE t.tgrelid = $1::oid AND t.tgname = ANY ($2)
"""


@entry_point
def move_pipeline(session: Session, name: str, new_source: str) -> None:
    """Have a pipeline watch another table of the same key and columns.

    Rows with the same content are not embedded again.

    Search goes on with what is stored: its views and functions are exchanged at the end, in milliseconds. Workers then
    compare each row of the table with what is stored, and take away what has no row any more.
    """
    require_control(session, name)
    target = load_source(session, source_oid(session, new_source), caller(session))
    bound_lock_wait(session)
    pipeline = load_alone(session, name, holds_source=False)
    if target.oid == pipeline.source_oid:
        accept_source(session, name)
        session.plpy.notice(f'pipeline "{name}" watches {target.qualified} already')
        return
    lock = f"LOCK TABLE {target.qualified} IN SHARE ROW EXCLUSIVE MODE"
    retry_locked(session, lambda: session.execute(lock), "the new source")
    swap = KeySwap.wanted(session, pipeline, target, is_moved=True)
    if not swap.is_needed:
        _queue_gone(session, pipeline, target, swap.keys)
    with being_reshaped(session, [name]):
        reshaping = Reshaping(session, [pipeline])

        def exchange() -> None:
            # In one try, because a reader of the view has locked it and waits for the source. A session that keeps the source
            # while it tries for the view would deadlock with that reader.
            _drop_triggers(session, pipeline)
            reshaping.take_away(ranks_on=not swap.is_needed)

        retry_locked(session, exchange, "the source or a view of the pipeline")
        reshaping.put_back(target.oid, reads_again=True)


def _drop_triggers(session: Session, pipeline: Pipeline) -> None:
    """End the capture of the table that was watched, if it is still there."""
    triggers = [names.trigger(pipeline.name, event) for event in names.EVENTS]
    for row in session.query(_TRIGGERS, ["bigint", "name[]"], pipeline.source_oid, triggers):
        session.execute(str(row["statement"]))


def _queue_gone(session: Session, pipeline: Pipeline, source: Source, keys: tuple[KeyColumn, ...]) -> None:
    """Queue the documents that have no row in the other table.

    Workers remove them. Reads keys alone.
    """
    rows = source.qualified if source.partitioned else f"ONLY {source.qualified}"
    same = " AND ".join(f"s.{quote_ident(key.source_name)} = d.{quote_ident(key.name)}" for key in keys)
    gone = f"{pipeline.document} AS d"
    session.execute(enqueue_query(pipeline, gone, f"NOT EXISTS (SELECT FROM {rows} AS s WHERE {same})"))
