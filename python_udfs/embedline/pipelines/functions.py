"""Create a pipeline's generated functions and the triggers for its source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from embedline.catalog.source import Source
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.errors import EmbedlineError, InvalidParameter
from embedline.pipelines.ddl.audit import audit_function_statements
from embedline.pipelines.ddl.functions import (
    changed_function_statement,
    content_function_statements,
    range_function_statement,
    read_function_statements,
    tenant_function_statements,
)
from embedline.pipelines.ddl.plan import FUNCTIONS, TABLES, CapturePlan
from embedline.pipelines.ddl.triggers import trigger_function_statements, trigger_statements
from embedline.postgres.relations import EXPRESSION_SCHEMA
from embedline.postgres.run_as import create_scratch_schema, run_as_owner
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import WRONG_RESULT_TYPE, sqlstate_of

_NOTE_SOURCE = """
    UPDATE embedline.pipeline AS p SET key_types = $2, source_columns = s.columns
    FROM (
        SELECT q.name, (SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_attribute AS a
            WHERE a.attrelid = q.source AND a.attnum > 0 AND NOT a.attisdropped) AS columns
        FROM embedline.pipeline AS q WHERE q.name = $1
    ) AS s
    WHERE p.name = s.name AND (p.key_types <> $2 OR p.source_columns <> s.columns)
"""


def create_functions(session: Session, plan: CapturePlan, source: Source) -> None:
    """Create the functions that read the source.

    Those of users' expressions are created only if the plan has their text.
    """
    owner = quote_ident(source.owner)
    _create_expression_functions(session, plan, source)
    for statement in (
        changed_function_statement(plan),
        *read_function_statements(plan),
        *tenant_function_statements(plan),
        *audit_function_statements(plan),
    ):
        session.execute(statement)
    tables = ", ".join(plan.generated(suffix) for suffix in TABLES)
    session.execute(f"GRANT SELECT ON {tables} TO {owner}")
    # Users' expressions run as the source's owner, as they would in a view of that owner, never as Embedline's. The
    # owner may name them, and nothing else. A role that can name a function of its own can alter it to run as its
    # caller.
    session.execute(f"GRANT USAGE ON SCHEMA {EXPRESSION_SCHEMA} TO {owner}")
    for row in generated_functions(session, plan.name, FUNCTIONS):
        session.execute(f"REVOKE ALL ON FUNCTION {row['signature']} FROM public")
        session.execute(f"ALTER FUNCTION {row['signature']} OWNER TO {owner}")


def _create_expression_functions(session: Session, plan: CapturePlan, source: Source) -> None:
    """Create the functions of users' expressions as the source's owner.

    They are then moved out of the owner's reach.
    """
    schema = create_scratch_schema(session, source.owner)
    for suffix, statement in content_function_statements(plan, schema).items():
        try:
            run_as_owner(session, source.owner, statement)
        except Exception as error:
            if suffix != "content" or sqlstate_of(error) != WRONG_RESULT_TYPE:
                raise
            raise InvalidParameter(
                f"the content of a file must be of type bytea: {error}",
                hint="Name the column that holds the file, or decode(column, 'base64'); for a column of addresses add"
                " changed_by => '...'.",
            ) from error
        created = session.query(
            """
            SELECT p.oid::regprocedure::text AS signature FROM pg_proc AS p
            WHERE p.pronamespace = $1::regnamespace AND p.proname = $2 AND p.prosqlbody IS NOT NULL AND NOT p.prosecdef
                AND pg_get_userbyid(p.proowner) = $3
            """,
            ["text", "text", "name"], schema, names.generated(plan.name, suffix), source.owner,
        )  # fmt: skip
        if len(created) != 1:
            raise EmbedlineError(
                f'code that runs with the expressions of pipeline "{plan.name}" has changed their functions'
            )
        session.execute(f"ALTER FUNCTION {created[0]['signature']} SET SCHEMA {EXPRESSION_SCHEMA}")
    session.execute(f"DROP SCHEMA {schema} CASCADE")


def generated_functions(session: Session, name: str, suffixes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return signature and suffix of a pipeline's generated functions, in order."""
    return session.query(
        """
        SELECT p.oid::regprocedure::text AS signature, w.suffix
        FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS w (name, suffix, position)
        JOIN pg_proc AS p ON p.proname = w.name
            AND p.pronamespace IN ('embedline_data'::regnamespace, 'embedline_expression'::regnamespace)
        ORDER BY w.position, p.oid
        """,
        ["text[]", "text[]"],
        [names.generated(name, suffix) for suffix in suffixes],
        list(suffixes),
    )


def rewrite_trigger_functions(session: Session, plan: CapturePlan) -> None:
    """Rewrite the functions that name the source's columns and types as text.

    Notes which columns and types they name.
    """
    for statement in (*trigger_function_statements(plan), range_function_statement(plan)):
        session.execute(statement)
    session.query(_NOTE_SOURCE, ["text", "text[]"], plan.name, [key.type for key in plan.keys])


def needs_row_triggers(plan: CapturePlan, source: Source) -> bool:
    """Return True if the source became a part of another table.

    Its statement triggers do not fire on a write through the parent.
    """
    return plan.capture == "statement" and source.is_child


def use_row_triggers(session: Session, plan: CapturePlan) -> CapturePlan:
    """Replace the statement triggers by row triggers; return the plan with them."""
    plan = replace(plan, capture="row")
    session.query("UPDATE embedline.pipeline SET capture = 'row' WHERE name = $1", ["text"], plan.name)
    for statement in (*trigger_function_statements(plan), *trigger_statements(plan)):
        session.execute(statement)
    return plan
