"""Make the plan of a pipeline's capture, new or from stored values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from embedline.catalog.source import Source, hidden_source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.media import require_modality
from embedline.core.recipe import PipelineSpec
from embedline.core.sql_text import quote_ident
from embedline.errors import InvalidParameter, NotFound, NotPermitted
from embedline.pipelines.ddl.plan import CapturePlan, KeyColumn, SourceExpression
from embedline.pipelines.expressions import ContentKind, deparsed
from embedline.postgres.relations import EXPRESSION_SCHEMA
from embedline.postgres.session import Session

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
    WHERE p.name = $1 AND c.relname = $2
"""
# Of the inputs' old values, then of the new ones: as the function was made, whatever the columns are now.
_INPUT_TYPES = """
    SELECT format_type(t.type_oid, NULL) AS type
    FROM pg_proc AS p, unnest(p.proargtypes::oid[]) WITH ORDINALITY AS t (type_oid, position)
    WHERE p.pronamespace = 'embedline_data'::regnamespace AND p.proname = $1 ORDER BY t.position
"""
# A BEFORE UPDATE row trigger may change an input that the statement does not name: UPDATE OF would not see it.
BEFORE_UPDATE = """
    SELECT EXISTS (
        SELECT FROM pg_trigger AS t
        WHERE t.tgrelid IN (SELECT $1::oid UNION ALL SELECT relid FROM pg_partition_tree($1::oid::regclass))
            AND NOT t.tgisinternal AND (t.tgtype & 1) = 1 AND (t.tgtype & 2) = 2 AND (t.tgtype & 16) = 16)
"""


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


def load_key(session: Session, source: Source) -> list[dict[str, Any]]:
    """Return the columns of the source's key, as KEY does; none where it has no key."""
    return session.query(KEY, ["bigint"], source.oid)


def key_of(session: Session, source: Source, rows: list[dict[str, Any]]) -> tuple[KeyColumn, ...]:
    """Return the key of these rows of KEY.

    Raises InvalidParameter if a pipeline cannot have it.
    """
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


def make_plan(session: Session, spec: PipelineSpec, source: Source) -> CapturePlan:
    """Return the plan of a new pipeline: key, expressions and kind of triggers."""
    keys = key_of(session, source, load_key(session, source))
    mode = spec.capture
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
    content = ContentKind(require_modality(spec.modality), spec.is_reference)
    expressions = deparsed(session, source, spec.expressions, spec.search_path, content)
    return CapturePlan(
        name=spec.name, source=source.qualified, keys=keys, content=expressions["content"],
        filter=expressions.get("filter"), capture=mode, always=source.subscribed or spec.capture == "row",
        watch_all=bool(session.scalar(BEFORE_UPDATE, ["bigint"], source.oid)),
        prefix=expressions.get("document_prefix"), tenant=expressions.get("tenant"), partitioned=source.partitioned,
        is_file=content.is_file,
    )  # fmt: skip


def content_kind(pipeline: Pipeline) -> ContentKind:
    """Return what the contents of a pipeline are."""
    return ContentKind(pipeline.modality, pipeline.is_reference)


def _key_column_name(source_name: str, position: int) -> str:
    name = f"key_{source_name}"
    return name if len(name.encode()) <= 63 else f"key_{position + 1}"


def current_plan(session: Session, pipeline: Pipeline) -> tuple[CapturePlan, Source]:
    """Return the plan for trigger functions and views, and the source.

    Columns have their current names.
    """
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
    key_types = (
        session.scalar(_KEY_TYPES, ["text", "text"], pipeline.name, names.generated(pipeline.name, "document"))
        or pipeline.key_types
    )
    keys = tuple(
        KeyColumn(str(row["attname"]), column, key_type, None)
        for row, column, key_type in zip(key_rows, pipeline.key_columns, key_types, strict=True)
    )
    types = session.query(_INPUT_TYPES, ["text"], names.generated(pipeline.name, "changed"))
    inputs = SourceExpression(
        "",
        tuple(
            (str(row["attname"]), str(types[i]["type"]) if 2 * len(input_rows) == len(types) else "")
            for i, row in enumerate(input_rows)
        ),
    )
    plan = CapturePlan(pipeline.name, source.qualified, keys, inputs, None, str(first["capture"]))
    sets = chunk_set_numbers(pipeline)
    return replace(
        plan, chunk_sets=sets, partitioned=source.partitioned, is_file=content_kind(pipeline).is_file
    ), source


def chunk_set_numbers(pipeline: Pipeline) -> tuple[int, ...]:
    """Return the numbers of the pipeline's chunk sets."""
    return tuple(sorted(chunk_set.number for chunk_set in (pipeline.chunk_set, *pipeline.other_sets)))
