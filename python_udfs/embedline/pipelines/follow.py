"""Follow a source whose columns, owner or parent change.

The event trigger embedline_follow_source calls this if the stored facts of a source are no longer true.
refresh_pipeline does it by hand, and brings the views up to date.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from embedline.catalog.load import load_versions
from embedline.catalog.rights import require_control
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.errors import EmbedlineError
from embedline.pipelines.alter import plan_in_use, replace_functions, restart_sweep
from embedline.pipelines.changed_keys import KeyNow, has_key, has_primary_key, is_small
from embedline.pipelines.ddl.plan import TABLES, CapturePlan
from embedline.pipelines.ddl.search_functions import create_search_functions, revoke_search_functions
from embedline.pipelines.ddl.triggers import resting_trigger_statements, update_trigger_statements
from embedline.pipelines.functions import (
    generated_functions,
    needs_row_triggers,
    rewrite_trigger_functions,
    use_row_triggers,
)
from embedline.pipelines.keyword_index import table_suffixes
from embedline.pipelines.plan import BEFORE_UPDATE, chunk_set_numbers, current_plan
from embedline.pipelines.register import grant_tables
from embedline.pipelines.replaced_views import refresh_views
from embedline.pipelines.reshaped import load_source_now
from embedline.pipelines.reshaping import Reshaping
from embedline.pipelines.state import load_alone
from embedline.pipelines.views import write_serving_function
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import bound_lock_wait, retry_locked
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of

# Who owns the functions; where REASSIGN OWNED gave them to the source's owner, this lacks the rights that they need.
_OWNER = """
    SELECT pg_get_userbyid(f.proowner) AS name, has_table_privilege(
        f.proowner, (SELECT oid FROM pg_class WHERE relnamespace = f.pronamespace AND relname = $1 || '_document'), 'SELECT'
    ) AS reads
    FROM pg_proc AS f WHERE f.pronamespace = 'embedline_data'::regnamespace AND f.proname = $1 || '_read'
"""
_OWNED_VIEWS = """
    SELECT c.oid::regclass::text AS name FROM pg_class AS c
    WHERE c.relowner = $2::regrole AND c.oid IN (
        SELECT routing_view FROM embedline.pipeline WHERE pipeline_id = $1
        UNION ALL SELECT view FROM embedline.version WHERE pipeline_id = $1)
"""

_REST = "UPDATE embedline.pipeline SET is_resting = $2 WHERE name = $1"
# The table that a person means by the pipeline's source; a rename is followed without a word, and meant from then on.
_ACCEPT_SOURCE = """
    UPDATE embedline.pipeline AS p SET source_name = format('%I.%I', n.nspname, c.relname)
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE p.name = $1 AND c.oid = p.source
        AND p.source_name IS DISTINCT FROM format('%I.%I', n.nspname, c.relname)
"""
# In GD: the names of pipelines whose objects this session is writing again.
_RESHAPED = "embedline.reshaped"
_TRANSACTION = "SELECT pg_current_xact_id()::text"


@entry_point
def refresh_pipeline(session: Session, name: str) -> None:
    """Bring a pipeline's views and triggers up to date with its source.

    Adds new columns to the views, and watches every update if a BEFORE trigger exists now.

    Follows another key of the source, however much has to be exchanged for it.
    """
    require_control(session, name)
    bound_lock_wait(session)
    pipeline = load_alone(session, name)
    load_source_now(session, pipeline.source_oid, pipeline)
    if _needs_reshaping(session, pipeline):
        _reshape(session, pipeline)
        return
    plan, source = _follow(session, pipeline)
    refresh_views(session, pipeline, plan, source)
    write_serving_function(session, plan, pipeline.version.number)
    _write_search_functions(session, pipeline, plan, source)
    _refresh_update_trigger(session, plan, source)
    accept_source(session, name)
    # Rows that an attached partition brought along, or that triggers could not see: the next sweep finds them.
    restart_sweep(session, pipeline)


@entry_point
def follow_source(session: Session, name: str) -> None:
    """Follow a change of the source; called by the event trigger."""
    if _is_reshaped(session, name):
        # Commands of ours, and of the statement that alter_source runs: all is written again after them.
        return
    pipeline = load_alone(session, name)
    now = KeyNow.of(session, pipeline)
    has_another = not now.is_key and has_primary_key(session, pipeline)
    if has_another and is_small(session, pipeline) and _could_reshape(session, pipeline):
        return
    if now.names is None:
        for statement in resting_trigger_statements(name):
            session.execute(statement)
        session.query(_REST, ["text", "boolean"], name, True)
    else:
        _follow(session, pipeline)


def _could_reshape(session: Session, pipeline: Pipeline) -> bool:
    """Follow another key at once; return False, with a warning, if that is refused.

    embedline.status then shows what to run.
    """
    try:
        with session.plpy.subtransaction():
            _reshape(session, pipeline)
    except (session.plpy.SPIError, EmbedlineError) as error:
        if sqlstate_of(error) in ENDING:
            raise
        session.plpy.warning(
            f'pipeline "{pipeline.name}" could not follow the key of its source: {error}',
            detail=getattr(error, "detail", None) or "",
            hint=f"SELECT embedline.refresh_pipeline('{pipeline.name}');",
        )
        return False
    return True


def _needs_reshaping(session: Session, pipeline: Pipeline) -> bool:
    """Return True if the pipeline's objects must be written again.

    The key is another one, or functions that read the source went with a dropped column.
    """
    now = KeyNow.of(session, pipeline)
    if now.names is None or (not now.is_key and has_key(session, pipeline)):
        return True
    return not generated_functions(session, pipeline.name, ("read",))


def _reshape(session: Session, pipeline: Pipeline) -> None:
    """Write the pipeline's objects again for the key that its source has now."""
    with being_reshaped(session, [pipeline.name]):
        source = load_source_now(session, pipeline.source_oid, pipeline)
        # Writers wait from here on: what they would capture by the old key has no place to go.
        lock = f"LOCK TABLE {source.qualified} IN SHARE ROW EXCLUSIVE MODE"
        retry_locked(session, lambda: session.execute(lock), "the source")
        reshaping = Reshaping(session, [pipeline])
        retry_locked(session, reshaping.take_away, "a view of the pipeline")
        reshaping.put_back(pipeline.source_oid, reads_again=True)


@contextmanager
def being_reshaped(session: Session, names: Sequence[str]) -> Iterator[None]:
    """For the length of a block, keep event triggers from following these pipelines."""
    begin_reshaping(session, names)
    yield
    end_reshaping(session, names)


def begin_reshaping(session: Session, names: Sequence[str]) -> None:
    """Leave these pipelines to this transaction.

    They rest, which a rollback to a savepoint undoes; it does not undo the cache.
    """
    transaction = str(session.scalar(_TRANSACTION))
    session.cache.setdefault(_RESHAPED, {}).update(dict.fromkeys(names, transaction))
    for name in names:
        session.query(_REST, ["text", "boolean"], name, True)


def end_reshaping(session: Session, names: Sequence[str]) -> None:
    """Have workers and event triggers come back to these pipelines."""
    for name in names:
        session.query(_REST, ["text", "boolean"], name, False)
        session.cache.setdefault(_RESHAPED, {}).pop(name, None)


def _is_reshaped(session: Session, name: str) -> bool:
    """Whether this transaction is writing the pipeline again."""
    if session.cache.get(_RESHAPED, {}).get(name) != session.scalar(_TRANSACTION):
        return False
    return bool(session.scalar("SELECT is_resting FROM embedline.pipeline WHERE name = $1", ["text"], name))


def accept_source(session: Session, name: str) -> None:
    """Note that the table that is watched is meant, whatever others are called."""
    session.query(_ACCEPT_SOURCE, ["text"], name)


def _follow(session: Session, pipeline: Pipeline) -> tuple[CapturePlan, Source]:
    plan, source = current_plan(session, pipeline)
    rewrite_trigger_functions(session, plan)
    for before in session.query(_OWNER, ["text"], pipeline.name):
        if before["name"] != source.owner or not before["reads"]:
            _give_to_owner(session, pipeline, str(before["name"]))
    if needs_row_triggers(plan, source):
        use_row_triggers(session, plan_in_use(session, pipeline)[0])
    return plan, source


def _give_to_owner(session: Session, pipeline: Pipeline, before: str) -> None:
    """Give the source's current owner the rights of the one before.

    These are the functions that read the source, the views, and the tables that the views read.
    """
    plan, source = plan_in_use(session, pipeline)
    replace_functions(session, plan, source, [])
    suffixes = ["hidden", *(names.chunk_suffix(number) for number in chunk_set_numbers(pipeline))]
    suffixes += [names.version_suffix(number) for _, number, _ in pipeline.versions]
    suffixes += table_suffixes(chunk_set_numbers(pipeline)) if pipeline.keyword else []
    grant_tables(session, plan, source, suffixes)
    _write_search_functions(session, pipeline, plan, source)
    if before == source.owner:
        return
    tables = ", ".join(plan.generated(suffix) for suffix in dict.fromkeys([*suffixes, *TABLES]))
    session.execute(f"REVOKE ALL ON {tables} FROM {quote_ident(before)}")
    for version in load_versions(session, pipeline.name):
        revoke_search_functions(session, version, before)
    for view in session.query(_OWNED_VIEWS, ["bigint", "text"], pipeline.pipeline_id, quote_ident(before)):
        session.execute(f"ALTER VIEW {view['name']} OWNER TO {quote_ident(source.owner)}")


def _write_search_functions(session: Session, pipeline: Pipeline, plan: CapturePlan, source: Source) -> None:
    for version in load_versions(session, pipeline.name):
        create_search_functions(session, version, plan, source)


def _refresh_update_trigger(session: Session, plan: CapturePlan, source: Source) -> None:
    """Have the trigger fire on every update if the source has a BEFORE trigger.

    Such a trigger may change an input that the statement does not name.
    """
    if not session.scalar(BEFORE_UPDATE, ["bigint"], source.oid):
        return
    name = names.trigger(plan.name, "update")
    rows = session.query(
        "SELECT tgenabled = 'A' AS always FROM pg_trigger WHERE tgrelid = $1::oid AND tgname = $2 AND tgattr <> ''",
        ["bigint", "name"], source.oid, name,
    )  # fmt: skip
    if rows:
        for statement in update_trigger_statements(replace(plan, watch_all=True, always=bool(rows[0]["always"]))):
            session.execute(statement)
