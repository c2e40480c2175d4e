"""Create and drop derived vectors, and the tables of each version."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from embedline.catalog.derived import Derived, every_derived_of, load_derived
from embedline.catalog.load import load_pipeline, load_versions
from embedline.catalog.rights import caller, require_control
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import AlreadyExists, InvalidParameter, NotPermitted
from embedline.pipelines.ddl import derived as ddl
from embedline.pipelines.ddl.derived import DerivedPlan
from embedline.pipelines.expressions import deparsed_value
from embedline.pipelines.plan import load_source, source_oid
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.locks import bound_lock_wait, hold_source
from embedline.postgres.readable import grant_select
from embedline.postgres.relations import SEARCH_SCHEMA, vector_schema
from embedline.postgres.session import Session

# A barrier, because a function in a caller's condition would be handed the vectors of subjects that are not shown.
_OPTIONS = "security_invoker = true, security_barrier = true"
# As names of pipelines: 40 and the longest generated suffix ("_derived_of_v123_subject_fkey") stay within 63 bytes.
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,29}\Z")
_COLUMNS = """
    SELECT a.attnum, a.attname FROM pg_attribute AS a WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped
"""
_REGISTER = """
    INSERT INTO embedline.derived (name, pipeline_id, events, event_columns, subject_expression, item_expression,
        weight_expression, at_expression, expression_search_path, subject_type, item_type, half_life, created_by)
    VALUES ($1, $2, $3::oid::regclass, $4, $5, $6, $7, $8, $9, $10, $11, $12::interval, $13)
"""
_SUBJECT_TYPE = """
    SELECT t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype = 'b' AND t.typcategory <> 'A' AND EXISTS (
        SELECT FROM pg_opclass AS o JOIN pg_am AS m ON m.oid = o.opcmethod WHERE m.amname = 'btree' AND o.opcdefault
            AND o.opcintype IN (t.oid, (SELECT c.casttarget FROM pg_cast AS c
                WHERE c.castsource = t.oid AND c.castmethod = 'b' AND c.castcontext = 'i' LIMIT 1)))
    FROM pg_type AS t WHERE t.oid = $1::regtype
"""
_READ_COLUMNS = """
    SELECT a.attname FROM pg_depend AS d JOIN pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
    WHERE d.classid = 'pg_proc'::regclass AND d.objid = to_regprocedure($1) AND d.refclassid = 'pg_class'::regclass
        AND d.refobjid = $2::oid AND d.refobjsubid > 0
"""
# The role that the functions run as, if the events have another owner.
_FORMER_OWNER = """
    SELECT pg_get_userbyid(p.proowner) FROM pg_proc AS p, pg_class AS c
    WHERE p.oid = to_regprocedure($1) AND c.oid = $2::oid AND p.proowner <> c.relowner
"""
_STORE_NAMES = """
    UPDATE embedline.derived SET event_columns = $2, subject_expression = $3, item_expression = $4,
        weight_expression = $5, at_expression = $6
    WHERE derived_id = $1 AND event_columns <> $2
"""
_OBJECTS = """
    SELECT p.oid::regprocedure::text AS signature FROM pg_proc AS p
    WHERE p.pronamespace IN ('embedline_data'::regnamespace, 'embedline_search'::regnamespace)
        AND (p.proname = ANY ($1) OR p.proname ~ ('^' || $2 || '_derived_of_v[0-9]+$'))
"""
_TRIGGERS = """
    SELECT format('DROP TRIGGER %I ON %s', t.tgname, t.tgrelid::regclass) AS statement FROM pg_trigger AS t
    JOIN pg_proc AS p ON p.oid = t.tgfoid
    WHERE p.pronamespace = 'embedline_data'::regnamespace AND t.tgparentid = 0 AND p.proname = ANY ($1)
"""


@entry_point
def create_derived(session: Session, parameters: dict[str, Any]) -> str:
    """Create derived vectors; return their view.

    Locks the events for the triggers' creation. Computes nothing: workers do.
    """
    required = ("name", "pipeline", "events", "subject", "item_key")
    require_given(**{name: parameters[name] for name in required})
    name = str(parameters["name"])
    if not _NAME.match(name):
        raise InvalidParameter(
            f'"{name}" cannot name derived vectors',
            hint="Use up to 30 lower-case letters, digits and underscores, not beginning with a digit.",
        )
    if session.scalar("SELECT 1 FROM embedline.derived WHERE name = $1", ["text"], name):
        raise AlreadyExists(
            f'there are derived vectors "{name}" already', hint=f"SELECT embedline.drop_derived('{name}') removes them."
        )
    require_control(session, str(parameters["pipeline"]))
    pipeline = load_pipeline(session, str(parameters["pipeline"]))
    bound_lock_wait(session)
    hold_source(session, pipeline.source_oid)
    events = load_source(session, source_oid(session, parameters["events"]), caller(session))
    if parameters["half_life"] is not None and parameters["at"] is None:
        raise InvalidParameter(
            "half_life needs the time of each event", hint="For example at => 'read_at', half_life => '30 days'."
        )
    plan = _register(session, pipeline, events, parameters)
    for statement in (*ddl.storage_statements(plan), *ddl.note_function_statements(plan)):
        session.execute(statement)
    create_readers(session, plan)
    for statement in ddl.trigger_statements(plan):
        session.execute(statement)
    add_version(session, plan.derived, pipeline)
    view = _create_view(session, plan, pipeline)
    session.query(f"INSERT INTO {plan.derived.generated('dirty')} (subjects) VALUES (NULL)")
    return view


def _register(session: Session, pipeline: Pipeline, events: Source, parameters: dict[str, Any]) -> DerivedPlan:
    numbers = {str(row["attname"]): int(row["attnum"]) for row in session.query(_COLUMNS, ["bigint"], events.oid)}
    columns: dict[int, str] = {}
    texts = {
        name: str(parameters[parameter])
        for name, parameter in (("subject", "subject"), ("item", "item_key"), ("weight", "weight"), ("at", "at"))
        if parameters[parameter] is not None
    }
    search_path = str(parameters["expression_search_path"])
    types = {}
    for name, text in texts.items():
        parameter = "item_key" if name == "item" else name
        found, types[name] = deparsed_value(session, events, text, parameter, search_path, {})
        columns |= {numbers[column]: column for column, _ in found.columns}
    _check_types(session, pipeline, types)
    session.query(
        _REGISTER,
        ["text", "bigint", "bigint", "jsonb", *["text"] * 8, "name"],
        parameters["name"], pipeline.pipeline_id, events.oid, json.dumps(columns), texts["subject"], texts["item"],
        texts.get("weight"), texts.get("at"), search_path, types["subject"], types["item"], parameters["half_life"],
        caller(session),
    )  # fmt: skip
    return plan_of(session, load_derived(session, str(parameters["name"])))


def _check_types(session: Session, pipeline: Pipeline, types: dict[str, str]) -> None:
    if not session.scalar(_SUBJECT_TYPE, ["text"], types["subject"]):
        raise InvalidParameter(
            f"subject is of type {types['subject']}, which cannot be ordered or is no part of PostgreSQL",
            hint="Cast it, for example subject => 'account::text'.",
        )
    numbers = ("smallint", "integer", "bigint", "numeric", "real", "double precision")
    if types.get("weight", "integer") not in numbers:
        raise InvalidParameter(f"weight is of type {types['weight']}, not a number")
    if types.get("at", "date") not in ("date", "timestamp with time zone", "timestamp without time zone"):
        raise InvalidParameter(f"at is of type {types['at']}, not a time")
    item, keys = types["item"], pipeline.key_types
    if len(keys) > 1:
        if item not in ("text[]", "character varying[]", "jsonb", "json", "text"):
            raise InvalidParameter(
                f'item_key is of type {item}, and pipeline "{pipeline.name}" has a key of {len(keys)} columns',
                hint="Give an array of their texts, for example item_key => 'ARRAY[tenant::text, document_id::text]'.",
            )
        return
    whole, texts = ("smallint", "integer", "bigint"), ("text", "character varying")
    key = re.sub(r"\(.*\)", "", keys[0])
    if item != key and not any(item in kind and key in kind for kind in (whole, texts)):
        raise InvalidParameter(
            f'item_key is of type {item}, the key of pipeline "{pipeline.name}" of type {keys[0]}',
            hint=f"Cast it: item_key => '(...)::{keys[0]}'.",
        )


def plan_of(session: Session, derived: Derived) -> DerivedPlan:
    """Return the plan of derived vectors, with the columns' names of now."""
    pipeline = load_pipeline(session, derived.pipeline)
    owner = session.scalar(
        "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = $1::oid", ["bigint"], derived.events_oid
    )
    events = load_source(session, derived.events_oid, str(session.scalar("SELECT current_user")))
    numbers = {str(row["attname"]): int(row["attnum"]) for row in session.query(_COLUMNS, ["bigint"], events.oid)}
    known_as = _known_as(session, derived, numbers)
    expressions = {
        name: deparsed_value(session, events, text, name, derived.search_path, known_as)[0]
        for name, text in derived.expressions.items()
    }
    return DerivedPlan(derived, replace(events, owner=str(owner)), expressions, numbers, pipeline.key_types)


def _known_as(session: Session, derived: Derived, numbers: dict[str, int]) -> dict[str, str]:
    """Return the names that the expressions use, by those that the columns have now.

    A restored table has other column numbers. There the reading function still names the same columns.
    """
    read = f"{derived.generated('read')}({derived.subject_type}[])"
    now = {str(row["attname"]) for row in session.query(_READ_COLUMNS, ["text", "bigint"], read, derived.events_oid)}
    if now in (set(), set(derived.event_columns.values())):
        return {}
    return {name: derived.event_columns.get(number, name) for name, number in numbers.items()}


def create_readers(session: Session, plan: DerivedPlan) -> None:
    derived = plan.derived
    for statement in (*ddl.reader_statements(plan), ddl.seen_statement(plan)):
        session.execute(statement)
    for signature in readers(derived):
        session.execute(f"REVOKE ALL ON FUNCTION {signature} FROM public")
        session.execute(f"ALTER FUNCTION {signature} OWNER TO {quote_ident(plan.events.owner)}")
    _grant_function(session, plan, derived.search_function("seen"))
    _grant_tables(session, plan, [derived.generated("subject")])


def readers(derived: Derived) -> list[str]:
    """Return the signatures of the functions that run as the owner of the events."""
    arguments = {"read": f"{derived.subject_type}[]", "of_items": "text[]", "all": ""}
    return [f"{derived.generated(part)}({arguments[part]})" for part in ddl.READERS]


def _grant_tables(session: Session, plan: DerivedPlan, tables: list[str]) -> None:
    grant_select(session, tables, plan.events.owner)
    session.execute(f"GRANT USAGE ON SCHEMA {SEARCH_SCHEMA} TO {quote_ident(plan.events.owner)}")


def follow_owner(session: Session, derived: Derived) -> None:
    """Give what reads the events to their owner, if they have another one by now."""
    former = session.scalar(_FORMER_OWNER, ["text", "bigint"], readers(derived)[0], derived.events_oid)
    if former is None:
        return
    plan, owner = plan_of(session, derived), quote_ident(str(former))
    numbers = [n for _, n, _ in load_pipeline(session, derived.pipeline).versions if has_version(session, derived, n)]
    tables = [derived.generated("subject"), *(derived.vectors(number) for number in numbers)]
    functions = [derived.search_function(part) for part in ("seen", *map(names.derived_version, numbers))]
    session.execute(f"REVOKE ALL ON {', '.join(tables)} FROM {owner}")
    for function in functions:
        session.execute(f"REVOKE ALL ON FUNCTION {function}({derived.subject_type}) FROM {owner}")
        _grant_function(session, plan, function)
    _grant_tables(session, plan, tables)
    for signature in readers(derived):
        session.execute(f"ALTER FUNCTION {signature} OWNER TO {quote_ident(plan.events.owner)}")
    view = _view(session, derived)
    if view is not None:
        session.execute(f"ALTER VIEW {view} OWNER TO {quote_ident(plan.events.owner)}")


def _view(session: Session, derived: Derived) -> str | None:
    """Return the qualified name of the view, None if it is gone."""
    name = session.scalar("SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], derived.view_oid)
    return None if name is None else str(name)


def _grant_function(session: Session, plan: DerivedPlan, function: str) -> None:
    signature = f"{function}({plan.derived.subject_type})"
    session.execute(f"REVOKE ALL ON FUNCTION {signature} FROM public")
    session.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO embedline_reader, {quote_ident(plan.events.owner)}")


def rewrite_note_functions(session: Session, derived: Derived) -> None:
    """Write the triggers' functions for the columns' names of now.

    Stores these names.
    """
    plan = plan_of(session, derived)
    for statement in ddl.note_function_statements(plan):
        session.execute(statement)
    texts = [
        plan.expressions[name].text if name in plan.expressions else None
        for name in ("subject", "item", "weight", "at")
    ]
    session.query(
        _STORE_NAMES, ["bigint", "jsonb", *["text"] * 4], derived.derived_id, json.dumps(_inputs(plan)), *texts
    )


def _inputs(plan: DerivedPlan) -> dict[int, str]:
    return {plan.numbers[name]: name for expression in plan.expressions.values() for name, _ in expression.columns}


def has_version(session: Session, derived: Derived, number: int) -> bool:
    """Return True if the version has a table of derived vectors."""
    return session.scalar("SELECT to_regclass($1) IS NOT NULL", ["text"], derived.vectors(number)) is True


def add_version(session: Session, derived: Derived, pipeline: Pipeline) -> None:
    """Create the table of a version's derived vectors, and watch its items.

    Takes SHARE ROW EXCLUSIVE on the chunks and the vectors for an instant, which only workers write.
    """
    plan, schema, number = plan_of(session, derived), vector_schema(session), pipeline.version.number
    vector_type = f"{schema}.vector({pipeline.version.dimensions})"
    for statement in (
        *ddl.version_statements(derived, number, vector_type),
        *ddl.item_trigger_statements(derived, pipeline.chunk, pipeline.vectors),
        ddl.vector_function_statement(plan, number, f"{schema}.vector"),
    ):
        session.execute(statement)
    _grant_tables(session, plan, [derived.vectors(number)])
    _grant_function(session, plan, derived.search_function(names.derived_version(number)))


def versions_to_add(session: Session, derived: Derived) -> list[Pipeline]:
    """Return the versions that are complete and have no derived vectors yet."""
    return [
        version
        for version in load_versions(session, derived.pipeline)
        if (version.version.state == "complete" or version.is_serving)
        and not has_version(session, derived, version.version.number)
    ]


def _create_view(session: Session, plan: DerivedPlan, pipeline: Pipeline) -> str:
    derived, events = plan.derived, plan.events
    view = f"{quote_ident(events.schema)}.{quote_ident(names.derived_view(derived.name))}"
    if session.scalar("SELECT to_regclass($1) IS NOT NULL", ["text"], view):
        raise AlreadyExists(f"{view} exists already", hint="Choose another name: the view is <name>_derived.")
    query = ddl.view_query(plan, pipeline.version.number, f"{vector_schema(session)}.vector")
    session.execute(f"CREATE VIEW {view} WITH ({_OPTIONS}) AS {query}")
    session.execute(f"ALTER VIEW {view} OWNER TO {quote_ident(events.owner)}")
    comment = f"Embedline: vectors of the subjects of {events.qualified}, derived from pipeline {derived.pipeline}"
    session.execute(f"COMMENT ON VIEW {view} IS {quote_literal(comment)}")
    session.execute(f"GRANT SELECT ON {view} TO embedline_reader")
    session.query(
        "UPDATE embedline.derived SET derived_view = $2::regclass WHERE derived_id = $1",
        ["bigint", "text"], derived.derived_id, view,
    )  # fmt: skip
    return view


def show_statements(session: Session, derived: Derived, pipeline: Pipeline) -> list[str]:
    """Return the statement that has the view show a version.

    It takes ACCESS EXCLUSIVE on the view. None if the view is gone.
    """
    view = _view(session, derived)
    if view is None:
        return []
    query = ddl.view_query(plan_of(session, derived), pipeline.version.number, f"{vector_schema(session)}.vector")
    return [f"CREATE OR REPLACE VIEW {view} WITH ({_OPTIONS}) AS {query}"]


@entry_point
def drop_derived(session: Session, name: str) -> None:
    """Remove derived vectors with their triggers; the events stay as they are."""
    derived = load_derived(session, name)
    _require_control(session, derived)
    bound_lock_wait(session)
    hold_source(session, load_pipeline(session, derived.pipeline).source_oid)
    remove(session, derived)


def _require_control(session: Session, derived: Derived) -> None:
    """Raise NotPermitted unless the caller may drop the derived vectors.

    The owner of the events may, the role that made them, and those who may change their pipeline.
    """
    role = caller(session)
    owns = session.scalar(
        """
        SELECT coalesce(pg_has_role($2, c.relowner, 'USAGE'), false)
            OR EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = d.created_by AND pg_has_role($2, r.oid, 'USAGE'))
        FROM embedline.derived AS d LEFT JOIN pg_class AS c ON c.oid = d.events WHERE d.name = $1
        """,
        ["text", "name"], derived.name, role,
    )  # fmt: skip
    if owns:
        return
    try:
        require_control(session, derived.pipeline)
    except NotPermitted as error:
        raise NotPermitted(f'must be owner of the events of derived vectors "{derived.name}"') from error


def remove(session: Session, derived: Derived) -> None:
    """Drop all that was generated for derived vectors."""
    notes = [names.derived(derived.name, f"note_{event}") for event in (*ddl.EVENTS, "items")]
    for row in session.query(_TRIGGERS, ["text[]"], notes):
        session.execute(row["statement"])
    view = _view(session, derived)
    if view is not None:
        session.execute(f"DROP VIEW {view}")
    functions = [*notes, *(names.derived(derived.name, part) for part in (*ddl.READERS, "seen"))]
    for row in session.query(_OBJECTS, ["text[]", "text"], functions, derived.name):
        session.execute(f"DROP FUNCTION {row['signature']}")
    for version in load_versions(session, derived.pipeline):
        session.execute(f"DROP TABLE IF EXISTS {derived.vectors(version.version.number)}")
    session.execute(f"DROP TABLE IF EXISTS {', '.join(derived.generated(part) for part in ddl.TABLES)}")
    session.query("DELETE FROM embedline.derived WHERE derived_id = $1", ["bigint"], derived.derived_id)


def remove_all(session: Session, pipeline: str) -> None:
    """Drop the derived vectors of a pipeline that is dropped."""
    for derived in every_derived_of(session, pipeline):
        remove(session, derived)


def remove_version(session: Session, pipeline: Pipeline) -> None:
    """Drop the derived vectors of a version that is dropped."""
    for derived in every_derived_of(session, pipeline.name):
        number = pipeline.version.number
        function = derived.search_function(names.derived_version(number))
        session.execute(f"DROP FUNCTION IF EXISTS {function}({derived.subject_type})")
        session.execute(f"DROP TABLE IF EXISTS {derived.vectors(number)}")
