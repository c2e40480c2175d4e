"""Creating, changing and dropping pipelines."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from embedline.catalog.load import Model, Pipeline, chunk_table_suffix, load_model, load_pipeline, load_versions
from embedline.catalog.rights import caller, require_control
from embedline.catalog.source import Source, hidden_source
from embedline.chunking import ChunkingSpec, chunking_spec
from embedline.core.expression import require_single_expression
from embedline.core.fingerprint import recipe_fingerprint
from embedline.core.sql_text import quote_ident
from embedline.errors import AlreadyExists, EmbedlineError, InvalidParameter, NotFound, NotPermitted
from embedline.indexes.cron_jobs import forget_index_jobs
from embedline.pipelines.ddl import capture
from embedline.pipelines.ddl.audit import audit_function_statements
from embedline.pipelines.ddl.capture import CapturePlan, KeyColumn, SourceExpression
from embedline.pipelines.ddl.search_functions import create_search_functions, drop_search_functions
from embedline.pipelines.views import (
    create_routing_view,
    create_version_view,
    require_droppable,
    shown_version,
    write_serving_function,
)
from embedline.postgres.run_as import Undone, create_scratch_schema, run_as_owner
from embedline.postgres.session import (
    EXPRESSION_SCHEMA,
    Session,
    as_mapping,
    bound_lock_wait,
    change_versions,
    entry_point,
    hold_source,
    sqlstate_of,
    vector_schema,
)
from embedline.queue.backfill import insert_ranges

# 46 + the longest generated suffix ("_chunk_content_hash_idx" and the like) stays within 63 bytes.
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,39}\Z")
# pgvector 0.8: HNSW indexes up to 2,000 dimensions of vector and 4,000 of halfvec.
INDEX_DIMENSIONS = {"vector": 2000, "halfvec": 4000}
# Parameters that are SQL expressions over a row of the source.
EXPRESSIONS = ("content", "filter", "document_prefix", "tenant")
_DEFAULT_CHUNK_TOKENS = 256
_SOURCE = """
    SELECT c.relkind, c.relpersistence, c.relispartition, n.nspname AS schema, c.relname AS name,
           pg_get_userbyid(c.relowner) AS owner,
           pg_has_role($2, c.relowner, 'USAGE') AS owned, has_schema_privilege($2, n.oid, 'CREATE') AS may_create,
           EXISTS (SELECT FROM pg_subscription_rel AS s WHERE s.srrelid = c.oid) AS subscribed,
           EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = c.oid) AS is_child,
           EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhparent = c.oid) AS has_children
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = $1::oid
"""
# The primary key, else the narrowest unique index over NOT NULL columns. A deferrable one holds at each commit, and no worker
# sees a row before that.
KEY = """
    SELECT a.attname, a.attnum, format_type(b.oid, b.typmod) AS type, format_type(b.oid, NULL) AS base,
           pg_get_userbyid(b.typowner) AS owner, current_user AS superuser,
           b.typnamespace = 'pg_catalog'::regnamespace
               OR (SELECT r.rolsuper FROM pg_roles AS r WHERE r.oid = b.typowner) AS trusted,
           CASE WHEN a.attcollation <> 0 THEN (SELECT quote_ident(cn.nspname) || '.' || quote_ident(co.collname)
               FROM pg_collation AS co JOIN pg_namespace AS cn ON cn.oid = co.collnamespace
               WHERE co.oid = a.attcollation AND co.collname <> 'default') END AS collation
    FROM (
        SELECT i.indexrelid, i.indkey FROM pg_index AS i
        WHERE i.indrelid = $1::oid AND i.indisunique AND i.indisvalid
            AND i.indpred IS NULL AND i.indexprs IS NULL
            AND NOT EXISTS (
                SELECT FROM pg_attribute AS a
                WHERE a.attrelid = i.indrelid AND NOT a.attnotnull
                    AND a.attnum = ANY ((i.indkey::smallint[])[0:i.indnkeyatts - 1]))
        ORDER BY i.indisprimary DESC, i.indimmediate DESC, i.indnkeyatts, i.indexrelid LIMIT 1
    ) AS k
    JOIN pg_index AS i ON i.indexrelid = k.indexrelid
    CROSS JOIN LATERAL unnest((i.indkey::smallint[])[0:i.indnkeyatts - 1]) WITH ORDINALITY AS u (attnum, position)
    JOIN pg_attribute AS a ON a.attrelid = $1::oid AND a.attnum = u.attnum
    -- Domains are left out, all the way down: their checks are their owners' code.
    CROSS JOIN LATERAL (
        WITH RECURSIVE base AS (
            SELECT t.oid, t.typbasetype, t.typtypmod, a.atttypmod AS typmod, t.typowner, t.typnamespace
            FROM pg_type AS t WHERE t.oid = a.atttypid
            UNION ALL
            SELECT t.oid, t.typbasetype, t.typtypmod, d.typtypmod, t.typowner, t.typnamespace
            FROM base AS d JOIN pg_type AS t ON t.oid = d.typbasetype
        )
        SELECT * FROM base WHERE typbasetype = 0
    ) AS b
    ORDER BY u.position
"""
# Unique indexes that are no key of all rows, and why.
_NEARLY_KEYS = """
    SELECT format('unique index %I %s', c.relname, CASE
        WHEN NOT i.indisvalid THEN 'is not valid'
        WHEN i.indpred IS NOT NULL THEN 'holds a part of the rows'
        WHEN i.indexprs IS NOT NULL THEN 'is over an expression'
        ELSE 'is over columns that may be NULL' END) AS reason
    FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE i.indrelid = $1::oid AND i.indisunique ORDER BY c.relname
"""
# As the generated tables hold the key: a type may be renamed, or move to another schema.
_KEY_TYPES = """
    SELECT array_agg(format_type(a.atttypid, a.atttypmod) ORDER BY k.position)
    FROM embedline.pipeline AS p, unnest(p.key_columns) WITH ORDINALITY AS k (name, position)
    JOIN pg_attribute AS a ON a.attname = k.name
    JOIN pg_class AS c ON c.oid = a.attrelid AND c.relnamespace = 'embedline_data'::regnamespace
    WHERE p.name = $1 AND c.relname = p.name || '_document'
"""
_NOTE_SOURCE = """
    UPDATE embedline.pipeline AS p SET key_types = $2, source_columns = s.columns
    FROM (
        SELECT q.name, (SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_attribute AS a
            WHERE a.attrelid = q.source AND a.attnum > 0 AND NOT a.attisdropped) AS columns
        FROM embedline.pipeline AS q WHERE q.name = $1
    ) AS s
    WHERE p.name = s.name AND (p.key_types <> $2 OR p.source_columns <> s.columns)
"""
_COLUMN_NAMES = """
    SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped
"""
_EXPRESSION = """
    SELECT pg_get_expr(conbin, conrelid) AS text FROM pg_constraint
    WHERE conrelid = $1::regclass AND contype = 'c'
"""
_INPUT_COLUMNS = """
    SELECT a.attname, a.attnum, format_type(a.atttypid, NULL) AS type
    FROM pg_constraint AS c, unnest(c.conkey) AS k (attnum), pg_attribute AS a
    WHERE c.conrelid = $1::regclass AND c.contype = 'c'
        AND a.attrelid = c.conrelid AND a.attnum = k.attnum
    ORDER BY a.attnum
"""
# Of the inputs' old values, then of the new ones: as the function was made, whatever the columns are now.
_INPUT_TYPES = """
    SELECT format_type(t.type_oid, NULL) AS type
    FROM pg_proc AS p, unnest(p.proargtypes::oid[]) WITH ORDINALITY AS t (type_oid, position)
    WHERE p.pronamespace = 'embedline_data'::regnamespace AND p.proname = $1 ORDER BY t.position
"""
_EXPRESSION_HINT = "Name columns without the table, for example title || E'\\n\\n' || body."
# Functions and operators' functions of an expression, by the node tree that PostgreSQL stores of it.
_VOLATILE = """
    SELECT p.oid::regprocedure::text AS signature
    FROM pg_constraint AS c, regexp_matches(c.conbin::text, ':(?:funcid|opfuncid) (\\d+)', 'g') AS m
    JOIN pg_proc AS p ON p.oid = m[1]::oid
    WHERE c.conrelid = $1::regclass AND c.contype = 'c' AND p.provolatile = 'v'
        -- A function of the user's is volatile until declared otherwise; only the known ones are refused.
        AND p.pronamespace = 'pg_catalog'::regnamespace LIMIT 1
"""
# A BEFORE UPDATE row trigger may change an input that the statement does not name: UPDATE OF would not see it.
BEFORE_UPDATE = """
    SELECT EXISTS (
        SELECT FROM pg_trigger AS t
        WHERE t.tgrelid IN (SELECT $1::oid UNION ALL SELECT relid FROM pg_partition_tree($1::oid::regclass))
            AND NOT t.tgisinternal AND (t.tgtype & 1) = 1 AND (t.tgtype & 2) = 2 AND (t.tgtype & 16) = 16)
"""


@entry_point
def create_pipeline(session: Session, given: dict[str, Any]) -> str:
    """Create everything of a pipeline; return its routing view. Takes O(blocks) of the source, embeds nothing."""
    name = _validated_name(session, given["name"])
    role = caller(session)
    source = load_source(session, source_oid(session, given["source"]), role)
    model = load_model(session, given["model"])
    check_recipe(given, model)
    bound_lock_wait(session)
    spec = spec_for(given["chunking"], given["chunk_tokens"], given["chunk_overlap"], given["chunking_options"], model)
    plan = _make_plan(session, name, source, given)
    for statement in capture.storage_statements(plan):
        session.execute(statement)
    create_functions(session, plan, source)
    pipeline_id = _register(session, given, plan, source, model, spec)
    create_version_table(session, plan, 1, 1, given["column_type"], model.config.dimensions)
    for statement in (*capture.trigger_function_statements(plan), *capture.trigger_statements(plan)):
        session.execute(statement)
    # Only now, under the triggers' lock: no row can come between the measured size and the capture.
    insert_ranges(session, pipeline_id, source.oid)
    shown = shown_version(session, load_pipeline(session, name))
    view = create_routing_view(session, pipeline_id, plan, source, shown)
    create_version_view(session, load_pipeline(session, name), plan, source)
    write_serving_function(session, plan, 1)
    grant_tables(session, plan, source, ["hidden", chunk_table_suffix(1), "v1"])
    create_search_functions(session, load_pipeline(session, name), plan, source)
    return view


def create_version_table(
    session: Session, plan: CapturePlan, number: int, chunk_set: int, column_type: str, dimensions: int | None
) -> None:
    """Create the table of a version's vectors."""
    vector_type = f"{vector_schema(session)}.{column_type}({dimensions})"
    for statement in capture.version_statements(plan, number, vector_type, chunk_set):
        session.execute(statement)


def _validated_name(session: Session, name: str) -> str:
    if not _NAME.match(name or ""):
        raise InvalidParameter(
            f'"{name}" cannot name a pipeline',
            hint="Use up to 40 lower-case letters, digits and underscores, not beginning with a digit.",
        )
    if session.scalar("SELECT pipeline_id FROM embedline.pipeline WHERE name = $1", ["text"], name) is not None:
        raise AlreadyExists(
            f'there is a pipeline "{name}" already', hint=f"SELECT embedline.drop_pipeline('{name}') removes it."
        )
    return name


def source_oid(session: Session, source: str | None) -> int:
    """Return the number of a table that a caller has named."""
    if source is None:
        raise InvalidParameter("source must not be NULL")
    # PL/Python hands a regclass over as its text, qualified where the pinned search_path does not find it.
    return int(session.scalar("SELECT $1::regclass::oid::bigint", ["text"], source))


def load_source(session: Session, oid: int, role: str) -> Source:
    """Return a table as a source; raise where it cannot be one, or not for this role."""
    rows = session.query(_SOURCE, ["bigint", "name"], oid, role)
    if not rows:
        raise NotFound("the source table does not exist")
    row = rows[0]
    label = f'"{row["schema"]}"."{row["name"]}"'
    if row["relkind"] not in ("r", "p") or row["relpersistence"] == "t":
        raise InvalidParameter(
            f"{label} cannot be a source: it is not a permanent table",
            hint="Name the table itself; views, foreign and temporary tables have no capture triggers.",
        )
    if row["has_children"] and row["relkind"] == "r":
        raise InvalidParameter(
            f"{label} cannot be a source: other tables inherit from it",
            detail="Their rows are seen through it, but no trigger of it sees them change, and its key is not theirs.",
            hint="Create a pipeline on each table that holds rows and has no children, or use a partitioned table.",
        )
    if row["schema"] in ("embedline", "embedline_data", EXPRESSION_SCHEMA, "pg_catalog", "information_schema"):
        raise InvalidParameter(f"{label} cannot be a source: it is a table of the system")
    if not row["owned"]:
        raise NotPermitted(
            f"must be owner of table {label}", hint=f"GRANT {row['owner']} TO the role that creates pipelines."
        )
    if not row["may_create"]:
        raise NotPermitted(
            f'permission denied for schema "{row["schema"]}"',
            hint=f'GRANT CREATE ON SCHEMA "{row["schema"]}" TO {role}; the routing view is created there.',
        )
    hidden = hidden_source(session, oid)
    if hidden is not None:
        raise InvalidParameter(f"{label} cannot be a source: {hidden.message}", hint=hidden.hint)
    return Source(
        oid=oid, schema=row["schema"], name=row["name"], owner=row["owner"],
        partitioned=row["relkind"] == "p", subscribed=row["subscribed"], is_child=row["is_child"],
    )  # fmt: skip


def check_recipe(given: dict[str, Any], model: Model) -> None:
    """Raise where parameters of a version are none, or do not fit together or the model."""
    choices = {
        "column_type": ("vector", "halfvec"),
        "distance": ("cosine", "inner_product", "l2"),
        "index_method": ("hnsw", "none"),
        "capture": ("auto", "statement", "row"),
    }
    for parameter, allowed in choices.items():
        if given[parameter] not in allowed:
            raise InvalidParameter(
                f'{parameter} "{given[parameter]}" is not known', hint=f"Use one of {', '.join(allowed)}."
            )
    check_weight(given["weight"])
    dimensions = model.config.dimensions or 0
    limit = INDEX_DIMENSIONS[given["column_type"]]
    if given["index_method"] == "hnsw" and dimensions > limit:
        hint = "Use index_method => 'none', or a model of fewer dimensions."
        if given["column_type"] == "vector" and dimensions <= INDEX_DIMENSIONS["halfvec"]:
            hint = "Use column_type => 'halfvec', which HNSW indexes up to 4000 dimensions."
        raise InvalidParameter(
            f"HNSW indexes {given['column_type']} up to {limit} dimensions; {dimensions} are too many", hint=hint
        )
    options = as_mapping(given["index_options"])
    for option, value in options.items():
        low, high = {"m": (2, 100), "ef_construction": (4, 1000)}.get(option, (1, 0))
        if not isinstance(value, int) or not low <= value <= high:
            raise InvalidParameter(
                f'index option "{option}" cannot be {value}',
                hint="HNSW takes m (2 to 100) and ef_construction (4 to 1000).",
            )


def check_weight(weight: float | None) -> None:
    """Raise unless the value can be a pipeline's weight."""
    if weight is None or not 0 < weight < math.inf:
        raise InvalidParameter(
            f"weight cannot be {weight}",
            hint="Use a number above 0: a pipeline of weight 2 gets twice the share of one of 1.",
        )


def spec_for(method: str, tokens: int | None, overlap: int, options: Any, model: Model) -> ChunkingSpec:
    """Return the chunking recipe of these parameters, checked against what the model reads."""
    limit = model.max_tokens
    if tokens is None:
        tokens = min(_DEFAULT_CHUNK_TOKENS, limit or _DEFAULT_CHUNK_TOKENS)
    spec = chunking_spec(method, tokens, overlap, as_mapping(options))
    if spec.tokens is not None and limit is not None and spec.tokens > limit:
        raise InvalidParameter(
            f"chunk_tokens {spec.tokens} does not fit the model",
            detail=f'Model "{model.config.name}" reads {limit} tokens.',
            hint=f"Use chunk_tokens => {limit} or less.",
        )
    return spec


def load_key(session: Session, source: Source) -> list[dict[str, Any]]:
    """Return the columns of the source's key, as KEY does; none where it has no key."""
    return session.query(KEY, ["bigint"], source.oid)


def key_of(session: Session, source: Source, rows: list[dict[str, Any]]) -> tuple[KeyColumn, ...]:
    """Return the key of these rows of KEY; raise InvalidParameter where it is none that a pipeline can have."""
    if not rows:
        near = [str(row["reason"]) for row in session.query(_NEARLY_KEYS, ["bigint"], source.oid)]
        raise InvalidParameter(
            f"table {source.qualified} has no primary key and no unique index over NOT NULL columns",
            detail=f"{'; '.join(near)}." if near else None,
            hint=f"ALTER TABLE {source.qualified} ADD PRIMARY KEY (...);",
        )
    for row in rows:
        if row["type"].endswith("[]"):
            raise InvalidParameter(
                f'key column "{row["attname"]}" of {source.qualified} is an array',
                hint="Use a key of scalar columns, for example a bigint identity.",
            )
        if not row["trusted"]:
            # Triggers and workers cast keys to text and back; casts are functions of their maker, who must own the type.
            raise InvalidParameter(
                f'key column "{row["attname"]}" of {source.qualified} has a type of role "{row["owner"]}", who is no superuser',
                detail="Keys are cast with Embedline's rights, and the owner of a type decides what its casts do.",
                hint=f"As a superuser: ALTER TYPE {row['base']} OWNER TO {quote_ident(row['superuser'])};",
            )
    return tuple(
        KeyColumn(row["attname"], _key_column_name(row["attname"], i), row["type"], row["collation"])
        for i, row in enumerate(rows)
    )


def _make_plan(session: Session, name: str, source: Source, given: dict[str, Any]) -> CapturePlan:
    keys = key_of(session, source, load_key(session, source))
    mode = given["capture"]
    if mode == "auto":
        mode = "row" if source.partitioned or source.subscribed or source.is_child else "statement"
    elif mode == "statement" and source.partitioned:
        raise InvalidParameter(
            f"{source.qualified} is partitioned and needs capture => 'row'",
            detail="A parent's statement triggers do not fire on a write to a partition.",
        )
    elif mode == "statement" and source.is_child:
        raise InvalidParameter(
            f"{source.qualified} is a part of another table and needs capture => 'row'",
            detail="Its statement triggers do not fire on a write through its parent.",
            hint="Leave capture out: auto takes row triggers here.",
        )
    expressions = deparsed(session, source, given)
    return CapturePlan(
        name=name, source=source.qualified, keys=keys, content=expressions["content"],
        filter=expressions.get("filter"), capture=mode, always=source.subscribed or given["capture"] == "row",
        watch_all=bool(session.scalar(BEFORE_UPDATE, ["bigint"], source.oid)),
        prefix=expressions.get("document_prefix"), tenant=expressions.get("tenant"), partitioned=source.partitioned,
    )  # fmt: skip


def deparsed(session: Session, source: Source, given: dict[str, Any]) -> dict[str, SourceExpression]:
    """Return the expressions among the parameters that are given, by parameter."""
    found = {
        parameter: _deparse(session, source, given[parameter], parameter, given["expression_search_path"])
        for parameter in EXPRESSIONS
        if given[parameter] is not None
    }
    if "content" in found and not found["content"].columns:
        raise InvalidParameter(
            "content names no column of the source", hint="For example content => $$title || E'\\n\\n' || body$$."
        )
    return found


def _key_column_name(source_name: str, position: int) -> str:
    name = f"key_{source_name}"
    return name if len(name.encode()) <= 63 else f"key_{position + 1}"


def deparse_again(
    session: Session, source: Source, expression: str, parameter: str, search_path: str, known_as: dict[str, str]
) -> SourceExpression:
    """Read a stored expression again, whose columns may have other names now: `known_as` tells the names that it uses."""
    return _deparse(session, source, expression, parameter, search_path, known_as)


def _rename_columns(session: Session, table: str, known_as: dict[str, str]) -> list[tuple[str, str]]:
    """Give columns of an empty copy of the source the names of before; return the renamings that undo it."""
    undo = []
    there = {str(row["attname"]) for row in session.query(_COLUMN_NAMES, ["text"], table)}
    moved = {now: then for now, then in known_as.items() if now != then}
    # Another column may have such a name now: it steps aside, as no expression of before can mean it.
    aside = [name for name in moved.values() if name in there and name not in moved]
    steps = [(name, f"embedline_aside_{i}") for i, name in enumerate(aside)]
    steps += [(now, f"embedline_moved_{i}") for i, now in enumerate(moved)]
    steps += [(f"embedline_moved_{i}", then) for i, then in enumerate(moved.values())]
    for before, after in steps:
        session.execute(f"ALTER TABLE {table} RENAME COLUMN {quote_ident(before)} TO {quote_ident(after)}")
        undo.append((after, before))
    return undo[::-1]


def _deparse(
    session: Session,
    source: Source,
    expression: str,
    parameter: str,
    search_path: str,
    known_as: dict[str, str] | None = None,
) -> SourceExpression:
    """Let PostgreSQL resolve the expression with the caller's search_path, and print it back fully qualified.

    A CHECK constraint on an empty copy of the table takes exactly what is wanted: an expression over one row, without
    aggregates, window or set-returning functions and subqueries, and prints it with bare column names.
    """
    require_single_expression(expression, parameter)
    # IS TRUE takes a boolean only; anything can be the text of a content.
    cast, test = ("", " IS TRUE") if parameter == "filter" else ("::pg_catalog.text", " IS NULL")
    text, columns, volatile = "", [], None
    try:
        # Rolled back: nothing stays of the table, nor of what the user's functions did.
        with contextlib.suppress(Undone), session.plpy.subtransaction():
            table = f"{create_scratch_schema(session, source.owner)}.source"
            session.execute(f"CREATE TABLE {table} (LIKE {source.qualified})")
            session.execute(f"ALTER TABLE {table} OWNER TO {quote_ident(source.owner)}")
            undo = _rename_columns(session, table, known_as or {})
            check = f"ALTER TABLE {table} ADD CHECK ((\n{expression}\n){cast}{test})"
            run_as_owner(session, source.owner, check, search_path)
            for before, after in undo:
                session.execute(f"ALTER TABLE {table} RENAME COLUMN {quote_ident(before)} TO {quote_ident(after)}")
            text = str(session.scalar(_EXPRESSION, ["text"], table)).removeprefix("(").removesuffix(f"{test})")
            columns = session.query(_INPUT_COLUMNS, ["text"], table)
            volatile = session.scalar(_VOLATILE, ["text"], table)
            raise Undone
    except Exception as error:
        state = sqlstate_of(error)
        if state[:2] not in ("42", "22", "0A"):
            raise
        raise InvalidParameter(
            f"{parameter} is not an expression over the columns of {source.qualified}: {error}", hint=_EXPRESSION_HINT
        ) from error
    if volatile:
        raise InvalidParameter(
            f"{parameter} calls {volatile}, which is volatile",
            hint="The same row must give the same text each time: use functions that are immutable or stable.",
        )
    if re.match(r"\(*ROW\(", text) or re.search(r"\.\*", re.sub(r"'(?:[^']|'')*'", "''", text)):
        raise InvalidParameter(
            f"{parameter} is a row, not a single value", hint="Join the columns: title || E'\\n\\n' || body."
        )
    if columns and columns[0]["attnum"] < 0:
        raise InvalidParameter(
            f"{parameter} is not an expression over the columns of {source.qualified}:"
            f" {columns[0]['attname']} is a system column",
            hint=_EXPRESSION_HINT,
        )
    return SourceExpression(text, tuple((str(row["attname"]), str(row["type"])) for row in columns))


def create_functions(session: Session, plan: CapturePlan, source: Source) -> None:
    """Create the functions that read the source; those of users' expressions only where the plan has their text."""
    owner = quote_ident(source.owner)
    _create_expression_functions(session, plan, source)
    for statement in (
        capture.changed_function_statement(plan),
        *capture.read_function_statements(plan),
        *capture.tenant_function_statements(plan),
        *audit_function_statements(plan),
    ):
        session.execute(statement)
    tables = ", ".join(plan.generated(suffix) for suffix in capture.TABLES)
    session.execute(f"GRANT SELECT ON {tables} TO {owner}")
    # Users' expressions run as the source's owner, as they would in a view of that owner, never as Embedline's. The owner
    # may name them, and nothing else: whoever can name a function that is theirs can alter it to run as its caller.
    session.execute(f"GRANT USAGE ON SCHEMA {EXPRESSION_SCHEMA} TO {owner}")
    for row in generated_functions(session, plan.name, capture.FUNCTIONS):
        session.execute(f"REVOKE ALL ON FUNCTION {row['signature']} FROM public")
        session.execute(f"ALTER FUNCTION {row['signature']} OWNER TO {owner}")


def _create_expression_functions(session: Session, plan: CapturePlan, source: Source) -> None:
    """Create the functions of users' expressions as the source's owner, and take them out of the owner's reach."""
    schema = create_scratch_schema(session, source.owner)
    for suffix, statement in capture.content_function_statements(plan, schema).items():
        run_as_owner(session, source.owner, statement)
        created = session.query(
            """
            SELECT p.oid::regprocedure::text AS signature FROM pg_proc AS p
            WHERE p.pronamespace = $1::regnamespace AND p.proname = $2 AND p.prosqlbody IS NOT NULL AND NOT p.prosecdef
                AND pg_get_userbyid(p.proowner) = $3
            """,
            ["text", "text", "name"], schema, f"{plan.name}_{suffix}", source.owner,
        )  # fmt: skip
        if len(created) != 1:
            raise EmbedlineError(
                f'code that runs with the expressions of pipeline "{plan.name}" has changed their functions'
            )
        session.execute(f"ALTER FUNCTION {created[0]['signature']} SET SCHEMA {EXPRESSION_SCHEMA}")
    session.execute(f"DROP SCHEMA {schema} CASCADE")


def generated_functions(session: Session, name: str, suffixes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return signature and suffix of a pipeline's generated functions of these suffixes, in their order."""
    return session.query(
        """
        SELECT p.oid::regprocedure::text AS signature, w.suffix
        FROM unnest($2::text[]) WITH ORDINALITY AS w (suffix, position)
        JOIN pg_proc AS p ON p.proname = $1 || '_' || w.suffix
            AND p.pronamespace IN ('embedline_data'::regnamespace, 'embedline_expression'::regnamespace)
        ORDER BY w.position, p.oid
        """,
        ["text", "text[]"],
        name,
        list(suffixes),
    )


def _register(
    session: Session, given: dict[str, Any], plan: CapturePlan, source: Source, model: Model, spec: ChunkingSpec
) -> int:
    pipeline_id = session.scalar(
        """
        INSERT INTO embedline.pipeline (name, source, content_expression, filter_expression, expression_search_path,
            key_attributes, input_attributes, key_columns, key_types, view_columns, capture, created_by,
            document_prefix_expression, tenant_expression, weight, code_version, source_name, source_columns)
        SELECT $1, $2::oid::regclass, $3, $4, $5,
            (SELECT array_agg(a.attnum ORDER BY k.position) FROM unnest($6) WITH ORDINALITY AS k (name, position)
                JOIN pg_attribute AS a ON a.attrelid = $2::oid AND a.attname = k.name),
            (SELECT array_agg(a.attnum ORDER BY k.position) FROM unnest($11) WITH ORDINALITY AS k (name, position)
                JOIN pg_attribute AS a ON a.attrelid = $2::oid AND a.attname = k.name),
            $7, $8, '{}', $9, $10, $12, $13, $14, $15, format('%I.%I', $16::text, $17::text),
            (SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_attribute AS a
                WHERE a.attrelid = $2::oid AND a.attnum > 0 AND NOT a.attisdropped)
        RETURNING pipeline_id
        """,
        ["text", "bigint", "text", "text", "text", "name[]", "text[]", "text[]", "text", "text", "name[]", "text", "text",
         "double precision", "integer", "text", "text"],
        plan.name, source.oid, given["content"], given["filter"], given["expression_search_path"],
        [key.source_name for key in plan.keys], [key.name for key in plan.keys], [key.type for key in plan.keys],
        plan.capture, caller(session), [name for name, _ in plan.expression_columns], given["document_prefix"],
        given["tenant"], given["weight"], capture.CODE_VERSION, source.schema, source.name,
    )  # fmt: skip
    session.query("SELECT embedline._resolve_attributes()")
    insert_chunk_set(session, pipeline_id, 1, spec, model)
    fingerprint = version_fingerprint(model, given["column_type"], given["distance"], spec, given["document_prefix"])
    version_id = insert_version(session, pipeline_id, 1, 1, model, given, fingerprint)
    session.query(
        "UPDATE embedline.pipeline SET serving_version_id = $2, recipe = $3 WHERE pipeline_id = $1",
        ["bigint", "bigint", "integer"], pipeline_id, version_id, recipe_stamp([fingerprint]),
    )  # fmt: skip
    session.query("INSERT INTO embedline.pipeline_health (pipeline_id) VALUES ($1)", ["bigint"], pipeline_id)
    return int(pipeline_id)


def insert_chunk_set(session: Session, pipeline_id: int, number: int, spec: ChunkingSpec, model: Model) -> None:
    """Register a way of chunking, whose tokens are those of `model`."""
    session.query(
        """
        INSERT INTO embedline.chunk_set (pipeline_id, number, chunking, chunk_tokens, chunk_overlap, chunking_options, tokenizer)
        SELECT $1, $2, $3, $4, $5, $6, m.tokenizer FROM embedline.model AS m WHERE m.model_id = $7
        """,
        ["bigint", "integer", "text", "integer", "integer", "jsonb", "bigint"],
        pipeline_id, number, spec.method, spec.tokens, spec.overlap, json.dumps(dict(spec.options)), model.model_id,
    )  # fmt: skip


def insert_version(
    session: Session,
    pipeline_id: int,
    number: int,
    chunk_set: int,
    model: Model,
    given: dict[str, Any],
    fingerprint: str,
) -> int:
    """Register a version with the recipe's parameters; return its id."""
    return int(
        session.scalar(
            """
            INSERT INTO embedline.version (pipeline_id, number, chunk_set, model_id, dimensions, column_type, distance,
                index_method, index_options, fingerprint)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) RETURNING version_id
            """,
            ["bigint", "integer", "integer", "bigint", "integer", "text", "text", "text", "jsonb", "text"],
            pipeline_id,
            number,
            chunk_set,
            model.model_id,
            model.config.dimensions,
            given["column_type"],
            given["distance"],
            given["index_method"],
            json.dumps(dict(as_mapping(given["index_options"]))),
            fingerprint,
        )
    )


def recipe_stamp(fingerprints: Sequence[str]) -> int:
    """Return the stamp of documents that are cut as these fingerprints ask for, as PostgreSQL's integer."""
    text = fingerprints[0] if len(fingerprints) == 1 else recipe_fingerprint({"fingerprints": list(fingerprints)})
    return int.from_bytes(bytes.fromhex(text[:8]), "big", signed=True)


def version_fingerprint(
    model: Model, column_type: str, distance: str, spec: ChunkingSpec, document_prefix: str | None
) -> str:
    """Return the fingerprint of all that decides a version's chunks and vectors but the content, which has its own hash."""
    return recipe_fingerprint({
        "model": model.fingerprint, "document_prefix": model.config.document_prefix,
        "query_prefix": model.config.query_prefix, "dimensions": model.config.dimensions, "column_type": column_type,
        "distance": distance, "normalised": distance != "l2", "chunking": spec.method, "chunk_tokens": spec.tokens,
        "chunk_overlap": spec.overlap, "chunking_options": dict(spec.options), "prefix_expression": document_prefix,
    })  # fmt: skip


def grant_tables(session: Session, plan: CapturePlan, source: Source, suffixes: Sequence[str]) -> None:
    """Let readers and the source's owner read generated tables, through the views.

    The views run with their reader's rights (security_invoker), so the source's own grants and row-level security decide at
    each query, also those given later. Readers have no USAGE on embedline_data: they cannot name the tables directly.
    """
    tables = ", ".join(plan.generated(suffix) for suffix in suffixes)
    session.execute(f"GRANT SELECT ON {tables} TO embedline_reader, {quote_ident(source.owner)}")


@entry_point
def drop_pipeline(session: Session, name: str) -> None:
    """Remove a pipeline with its triggers, view, functions and tables; the source stays as it is."""
    require_control(session, name)
    bound_lock_wait(session)
    forget_index_jobs(session, name)
    for row in session.query(
        """
        SELECT format('%I', t.tgname) AS trigger, t.tgrelid::regclass::text AS source FROM pg_trigger AS t
        JOIN pg_proc AS p ON p.oid = t.tgfoid
        WHERE p.pronamespace = 'embedline_data'::regnamespace AND t.tgparentid = 0
            AND p.proname = ANY (
                SELECT $1 || '_capture_' || e FROM unnest('{insert,update,delete,truncate}'::text[]) AS e)
        """,
        ["text"], name,
    ):  # fmt: skip
        session.execute(f"DROP TRIGGER {row['trigger']} ON {row['source']}")
    pipeline = load_pipeline(session, name)
    versions = load_versions(session, name)
    for oid in (pipeline.view_oid, *(version.version.view_oid for version in versions)):
        view = session.scalar("SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], oid)
        if view is not None:
            require_droppable(session, view, oid)
            session.execute(f"DROP VIEW {view}")
    for row in generated_functions(session, name, (*capture.FUNCTIONS, *capture.TRIGGER_FUNCTIONS, "serving")):
        session.execute(f"DROP FUNCTION IF EXISTS {row['signature']}")
    for version in versions:
        drop_search_functions(session, version)
        session.execute(f"DROP TABLE IF EXISTS {version.vectors}")
    tables = [
        *(pipeline.generated(suffix) for suffix in capture.TABLES),
        *pipeline.chunk_tables,
    ]
    session.execute(f"DROP TABLE IF EXISTS {', '.join(tables)}")
    session.query("DELETE FROM embedline.pipeline WHERE name = $1", ["text"], name)


@entry_point
def pause_pipeline(session: Session, name: str) -> None:
    """Stop embedding a pipeline; its changes are captured and wait."""
    _set_state(session, name, "paused")


@entry_point
def resume_pipeline(session: Session, name: str) -> None:
    """Embed a paused pipeline again."""
    _set_state(session, name, "active")


def _set_state(session: Session, name: str, state: str) -> None:
    require_control(session, name)
    session.query("UPDATE embedline.pipeline SET state = $2 WHERE name = $1", ["text", "text"], name, state)


def load_alone(session: Session, name: str, *, holds_source: bool = True) -> Pipeline:
    """Return the pipeline as it is once nobody else changes its versions, and keep it so to the end of the transaction.

    Whoever has something to wait for before it touches a generated table holds the source only then (`holds_source`): a
    TRUNCATE waits for that, and every writer behind it.
    """
    change_versions(session, load_pipeline(session, name).pipeline_id)
    pipeline = load_pipeline(session, name)
    if holds_source:
        hold_source(session, pipeline.source_oid)
    return pipeline


def rewrite_trigger_functions(session: Session, plan: CapturePlan) -> None:
    """Write the functions anew that name the source's columns and their types in plain text, and note what they name."""
    for statement in (*capture.trigger_function_statements(plan), capture.range_function_statement(plan)):
        session.execute(statement)
    session.query(_NOTE_SOURCE, ["text", "text[]"], plan.name, [key.type for key in plan.keys])


def needs_row_triggers(plan: CapturePlan, source: Source) -> bool:
    """Whether the source became a part of another table: its statement triggers do not fire on a write through that."""
    return plan.capture == "statement" and source.is_child


def use_row_triggers(session: Session, plan: CapturePlan) -> CapturePlan:
    """Put row triggers in the place of the statement triggers; return the plan with them."""
    plan = replace(plan, capture="row")
    session.query("UPDATE embedline.pipeline SET capture = 'row' WHERE name = $1", ["text"], plan.name)
    for statement in (*capture.trigger_function_statements(plan), *capture.trigger_statements(plan)):
        session.execute(statement)
    return plan


def current_plan(session: Session, pipeline: Pipeline) -> tuple[CapturePlan, Source]:
    """Return what is needed to write a pipeline's trigger functions and view, with the names of now."""
    session.query("SELECT embedline._resolve_attributes()")
    key_rows, input_rows = (
        session.query(
            f"""
            SELECT a.attname
            FROM embedline.pipeline AS p, unnest(p.{attributes}) WITH ORDINALITY AS k (attnum, position)
            JOIN pg_attribute AS a ON a.attnum = k.attnum
            WHERE p.name = $1 AND a.attrelid = p.source ORDER BY k.position
            """,
            ["text"],
            pipeline.name,
        )
        for attributes in ("key_attributes", "input_attributes")
    )
    rows = session.query(
        "SELECT n.nspname, c.relname, c.relkind, pg_get_userbyid(c.relowner) AS owner, p.capture,"
        " EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = c.oid) AS is_child FROM pg_class AS c"
        " JOIN pg_namespace AS n ON n.oid = c.relnamespace JOIN embedline.pipeline AS p ON p.source = c.oid"
        " WHERE p.name = $1",
        ["text"], pipeline.name,
    )  # fmt: skip
    if not rows:
        raise NotFound(
            f'the source of pipeline "{pipeline.name}" is gone',
            hint=f"SELECT embedline.move_pipeline('{pipeline.name}', 'another_table'); or"
            f" SELECT embedline.drop_pipeline('{pipeline.name}');",
        )
    first = rows[0]
    source = Source(
        pipeline.source_oid, first["nspname"], first["relname"], first["owner"], first["relkind"] == "p", False,
        is_child=first["is_child"],
    )  # fmt: skip
    key_types = session.scalar(_KEY_TYPES, ["text"], pipeline.name) or pipeline.key_types
    keys = tuple(
        KeyColumn(str(row["attname"]), column, key_type, None)
        for row, column, key_type in zip(key_rows, pipeline.key_columns, key_types, strict=True)
    )
    types = session.query(_INPUT_TYPES, ["text"], f"{pipeline.name}_changed")
    inputs = SourceExpression(
        "",
        tuple(
            (str(row["attname"]), str(types[i]["type"]) if 2 * len(input_rows) == len(types) else "")
            for i, row in enumerate(input_rows)
        ),
    )
    plan = CapturePlan(pipeline.name, source.qualified, keys, inputs, None, str(first["capture"]))
    return replace(plan, chunk_sets=chunk_set_numbers(pipeline), partitioned=source.partitioned), source


def chunk_set_numbers(pipeline: Pipeline) -> tuple[int, ...]:
    """Return the numbers of the pipeline's chunk sets."""
    return tuple(sorted(chunk_set.number for chunk_set in (pipeline.chunk_set, *pipeline.other_sets)))
