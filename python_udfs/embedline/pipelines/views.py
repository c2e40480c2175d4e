"""Create and recreate the routing view and the view of each version.

Everything that ranks by a version that it has chosen itself (search, evaluate, shadow reads) reads that version's
view. So it never meets another model's vectors, whatever is cut over meanwhile. The routing view is for the users'
own statements. A statement that has locked it keeps the version that it shows to the end of its transaction.
`serving_number` tells embed_query which one that is, past the snapshot, as the view's definition is.
"""

from __future__ import annotations

import json

from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import AlreadyExists
from embedline.pipelines.ddl import view as view_sql
from embedline.pipelines.ddl.plan import CHUNK_COLUMNS, CapturePlan
from embedline.pipelines.ddl.view import ShownVersion
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session

MAX_VIEW_COLUMNS = 1600
_SOURCE_COLUMNS = """
    SELECT attname, attnum FROM pg_attribute
    WHERE attrelid = $1::oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_HAS_POLICIES = "SELECT relrowsecurity FROM pg_class WHERE oid = $1::oid"


def view_exists(session: Session, oid: int) -> bool:
    """Whether a view that the catalogue knows is still there."""
    return session.scalar("SELECT 1 FROM pg_class WHERE oid = $1::oid AND relkind = 'v'", ["bigint"], oid) is not None


def view_query(
    session: Session, source: Source, plan: CapturePlan, columns: list[tuple[str, str, bool]], shown: ShownVersion
) -> str:
    """Return the query of a view over these columns.

    Its form depends on row-level security of the source.
    """
    has_policies = bool(session.scalar(_HAS_POLICIES, ["bigint"], source.oid))
    return view_sql.view_query(plan, columns, shown, has_policies=has_policies)


def view_name(source: Source, pipeline_name: str, number: int | None = None) -> str:
    """Return the qualified, quoted name of the routing view, or of one version's view."""
    return f"{quote_ident(source.schema)}.{quote_ident(names.view(pipeline_name, number))}"


def create_routing_view(
    session: Session, pipeline_id: int, plan: CapturePlan, source: Source, shown: ShownVersion
) -> str:
    """Create the routing view and note its columns' names; return its name."""
    view = view_name(source, plan.name)
    _require_free(session, view, "its routing view is <name>_embedding")
    attributes = _shown_attributes(session, plan, source, view)
    names = list(attributes)
    view_columns = {column: free_name(column, names) for column in CHUNK_COLUMNS}
    columns = [(name, name, False) for name in names] + [(c, n, True) for c, n in view_columns.items()]
    view_columns |= {key.name: key.source_name for key in plan.keys}
    _create(session, view, view_query(session, source, plan, columns, shown), source.owner)
    comment = f"Embedline pipeline {plan.name}: each row of {source.qualified} with its chunks and their embeddings"
    session.execute(f"COMMENT ON VIEW {view} IS {quote_literal(comment)}")
    session.query(
        "UPDATE embedline.pipeline SET routing_view = $2::regclass, view_columns = $3, view_attributes = $4"
        " WHERE pipeline_id = $1",
        ["bigint", "text", "jsonb", "jsonb"], pipeline_id, view, json.dumps(view_columns), json.dumps(attributes),
    )  # fmt: skip
    session.execute(f"GRANT SELECT ON {view} TO embedline_reader")
    return view


def create_version_view(session: Session, pipeline: Pipeline, plan: CapturePlan, source: Source) -> None:
    """Create the view over one version alone.

    Its columns have the names that the routing view gives them.
    """
    version = pipeline.version
    view = view_name(source, plan.name, version.number)
    _require_free(session, view, "the view of each version is <name>_embedding_v<number>")
    _create(session, view, version_query(session, pipeline, plan, source, view), source.owner)
    comment = f"Embedline pipeline {plan.name}, version {version.number} alone: for search before and after its cutover"
    session.execute(f"COMMENT ON VIEW {view} IS {quote_literal(comment)}")
    session.execute(f"GRANT SELECT ON {view} TO embedline_reader")
    session.query(
        "UPDATE embedline.version SET view = $2::regclass WHERE version_id = $1",
        ["bigint", "text"], version.version_id, view,
    )  # fmt: skip


def version_query(session: Session, pipeline: Pipeline, plan: CapturePlan, source: Source, view: str) -> str:
    """Return the query of the view over one version alone."""
    of_chunk = {column: pipeline.view_columns[column] for column in CHUNK_COLUMNS}
    names = [name for name in _shown_attributes(session, plan, source, view) if name not in of_chunk.values()]
    shown_as = {key.source_name: pipeline.view_columns[key.name] for key in plan.keys}
    columns = [(name, shown_as.get(name, name), False) for name in names] + [(c, n, True) for c, n in of_chunk.items()]
    shown = ShownVersion(pipeline.version.number, pipeline.chunk_set.number, None)
    return view_query(session, source, plan, columns, shown)


def _require_free(session: Session, view: str, reason: str) -> None:
    if session.scalar("SELECT to_regclass($1)::text", ["text"], view) is not None:
        raise AlreadyExists(f"{view} exists already", hint=f"Choose another pipeline name: {reason}.")


def _create(session: Session, view: str, query: str, owner: str) -> None:
    session.execute(f"CREATE VIEW {view} WITH (security_invoker = true) AS {query}")
    session.execute(f"ALTER VIEW {view} OWNER TO {quote_ident(owner)}")


def source_attributes(session: Session, source: Source) -> dict[str, int]:
    """Return the source's columns now: name to attribute number, in their order."""
    return {str(row["attname"]): int(row["attnum"]) for row in session.query(_SOURCE_COLUMNS, ["bigint"], source.oid)}


def _shown_attributes(session: Session, plan: CapturePlan, source: Source, view: str) -> dict[str, int]:
    attributes = source_attributes(session, source)
    if len(attributes) + len(CHUNK_COLUMNS) > MAX_VIEW_COLUMNS:
        session.plpy.notice(
            f"view {view} shows only the key of {source.qualified}: a view has at most {MAX_VIEW_COLUMNS} columns"
        )
        attributes = {key.source_name: attributes[key.source_name] for key in plan.keys}
    return attributes


def free_name(column: str, taken: list[str]) -> str:
    """Return the name under which a view shows a column beside those that it has."""
    name = column
    while name in taken:
        name = f"embedline_{name}"
    return name


def shown_version(session: Session, pipeline: Pipeline) -> ShownVersion:
    """Return how the routing view shows the pipeline's version."""
    type_name = f"{vector_schema(session)}.{pipeline.version.column_type}"
    return ShownVersion(pipeline.version.number, pipeline.chunk_set.number, type_name)


def write_serving_function(session: Session, plan: CapturePlan, number: int) -> None:
    """Write the function that names the serving version.

    It is written in the transaction that changes the routing view.

    Its body is read through the system cache (pg_get_functiondef), which knows no snapshot, just as the parser reads
    the view. So a REPEATABLE READ transaction that began before a cutover and reads the view after it embeds with the
    same model.
    """
    function = f"{plan.generated('serving')}()"
    session.execute(
        f"CREATE OR REPLACE FUNCTION {function} RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT {number}'"
    )
    session.execute(f"REVOKE ALL ON FUNCTION {function} FROM public")
