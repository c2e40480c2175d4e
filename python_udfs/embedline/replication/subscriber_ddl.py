"""Write the statements that prepare a subscriber of a pipeline.

Any PostgreSQL server with pgvector runs them. Nothing in them needs Embedline, PL/Python or pg_cron. They may be run
again: they add what a later version brought.
"""

from __future__ import annotations

from dataclasses import replace

import embedline
from embedline.catalog.load import load_pipeline, load_versions
from embedline.catalog.rights import require_control
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.errors import NotFound
from embedline.indexes.definitions import create_index_statement, own_index
from embedline.pipelines import published
from embedline.pipelines.ddl.plan import CapturePlan
from embedline.pipelines.plan import current_plan
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.replication.routes import Subscriber, route_statements, search_statement, version_view
from embedline.replication.tables import ROUTING_COLUMNS, source_is_published

_COLUMNS = """
    SELECT quote_ident(a.attname) AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS is_set,
        CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) END AS generated
    FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
# The columns by which an UPDATE or a DELETE names a row of the source; NULL with REPLICA IDENTITY FULL.
_IDENTITY = """
    SELECT array_agg(quote_ident(a.attname) ORDER BY u.position) AS columns
    FROM pg_class AS c JOIN pg_index AS i ON i.indrelid = c.oid
        AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END
    CROSS JOIN LATERAL unnest((i.indkey::smallint[])[0:i.indnkeyatts - 1]) WITH ORDINALITY AS u (attnum, position)
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = u.attnum
    WHERE c.oid = $1::oid
"""
_HAS_POLICIES = "SELECT relrowsecurity FROM pg_class WHERE oid = $1::oid"


@entry_point
def subscriber_ddl(session: Session, name: str, with_source: bool | None, reader: str | None) -> str:
    """Return the statements that prepare a subscriber.

    They cover all versions of the pipeline, those that are not published yet, too: a subscriber creates them first.
    """
    require_control(session, name)
    pipeline = load_pipeline(session, name)
    if not published.is_published(session, name):
        raise NotFound(
            f'pipeline "{name}" has no publication',
            hint=f"SELECT * FROM embedline.publication('{name}'); makes one.",
        )
    plan, source = current_plan(session, pipeline)
    has_source = source_is_published(session, pipeline) if with_source is None else with_source
    has_policies = bool(session.scalar(_HAS_POLICIES, ["bigint"], source.oid))
    versions = load_versions(session, name)
    subscriber = Subscriber(pipeline, plan, source, has_source=has_source, reader=reader)
    statements = [
        "CREATE EXTENSION IF NOT EXISTS vector",
        "CREATE SCHEMA IF NOT EXISTS embedline_data",
        "REVOKE ALL ON SCHEMA embedline_data FROM public",
        *([] if source.schema == "public" else [f"CREATE SCHEMA IF NOT EXISTS {quote_ident(source.schema)}"]),
        *(_source_statements(session, source, plan) if has_source else []),
        *_table_statements(session, plan, versions),
        *(_policy_statements(source, versions, has_source=has_source) if has_policies else []),
        f"CREATE TABLE IF NOT EXISTS {subscriber.routing} ({ROUTING_COLUMNS})",
        *(version_view(session, subscriber, version) for version in versions),
        *route_statements(subscriber, versions),
        search_statement(subscriber),
        *_grants(subscriber, versions),
    ]
    text = "".join(f"{statement};\n" for statement in statements)
    return f"{_preface(pipeline)}{text}{_indexes(versions)}"


def _preface(pipeline: Pipeline) -> str:
    subscription = names.publication(pipeline.name)
    return (
        f"-- A subscriber of publication {subscription}, by Embedline {embedline.__version__}.\n"
        "-- Run it as the role that will own the subscription; it may be run again. The first time, go on with:\n"
        f"--     CREATE SUBSCRIPTION {subscription} CONNECTION '...' PUBLICATION {subscription};\n"
        "-- After a version was added, once this ran on every subscriber:\n"
        f"--     SELECT * FROM embedline.publication('{pipeline.name}', tables_created => true);   on the publisher, then\n"
        f"--     ALTER SUBSCRIPTION {subscription} REFRESH PUBLICATION;   here\n"
    )


def _source_statements(session: Session, source: Source, plan: CapturePlan) -> list[str]:
    columns = [
        f"{row['name']} {row['type']}"
        + (f" GENERATED ALWAYS AS ({row['generated']}) STORED" if row["generated"] is not None else "")
        + (" NOT NULL" if row["is_set"] else "")
        for row in session.query(_COLUMNS, ["bigint"], source.oid)
    ]
    keys = [quote_ident(key.source_name) for key in plan.keys]
    identity = session.scalar(_IDENTITY, ["bigint"], source.oid) or keys
    columns.append(f"PRIMARY KEY ({', '.join(identity)})")
    statements = [f"CREATE TABLE IF NOT EXISTS {source.qualified} (\n    " + ",\n    ".join(columns) + "\n)"]
    if {key.source_name for key in plan.keys} != {str(name).strip('"') for name in identity}:
        index = quote_ident(names.generated(plan.name, "source_key_idx"))
        statements.append(f"CREATE INDEX IF NOT EXISTS {index} ON {source.qualified} ({', '.join(keys)})")
    return statements


def _table_statements(session: Session, plan: CapturePlan, versions: list[Pipeline]) -> list[str]:
    """Return the tables of hidden keys, chunks and vectors.

    They have no foreign keys, because the copies of a subscription begin in any order.
    """
    keys = ", ".join(key.definition for key in plan.keys)
    hidden, hidden_index = plan.generated("hidden"), quote_ident(names.generated(plan.name, "hidden_key_idx"))
    statements = [
        f"CREATE TABLE IF NOT EXISTS {hidden} ({keys})",
        f"CREATE INDEX IF NOT EXISTS {hidden_index} ON {hidden} ({plan.key_names})",
    ]
    for number in dict.fromkeys(version.chunk_set.number for version in versions):
        suffix = names.chunk_suffix(number)
        index = quote_ident(names.generated(plan.name, f"{suffix}_key_idx"))
        statements += [
            f"CREATE TABLE IF NOT EXISTS {plan.generated(suffix)} (\n    chunk_id bigint PRIMARY KEY, {keys},\n"
            "    seq integer NOT NULL, start_offset integer NOT NULL, end_offset integer NOT NULL,\n"
            "    content_hash uuid NOT NULL, content text NOT NULL, prefix text\n)",
            f"CREATE INDEX IF NOT EXISTS {index} ON {plan.generated(suffix)} ({plan.key_names})",
        ]
    for version in versions:
        column = quote_ident(version.version.column)
        statements += [
            f"CREATE TABLE IF NOT EXISTS {version.vectors}"
            f" (chunk_id bigint PRIMARY KEY, {column} {version.version.vector_type} NOT NULL)",
            f"ALTER TABLE {version.vectors} ALTER COLUMN {column} SET STORAGE EXTERNAL",
        ]
    return statements


def _policy_statements(source: Source, versions: list[Pipeline], *, has_source: bool) -> list[str]:
    """Close what row-level security closes on the publisher.

    Policies are not replicated.
    """
    tables = [source.qualified] if has_source else list(dict.fromkeys(version.chunk for version in versions))
    note = (
        "-- The source has row-level security, and its policies are not replicated. Create some here: before that only the\n"
        "-- owner of these tables reads a row of them.\n"
    )
    statements = [f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY" for table in tables]
    return [note + statements[0], *statements[1:]]


def _grants(subscriber: Subscriber, versions: list[Pipeline]) -> list[str]:
    """Let a role search.

    It gets no USAGE on embedline_data, so it reads the tables through the views alone.
    """
    if subscriber.reader is None:
        return []
    role = quote_ident(subscriber.reader)
    tables = [
        *([subscriber.source.qualified] if subscriber.has_source else []),
        subscriber.plan.generated("hidden"),
        *dict.fromkeys(version.chunk for version in versions),
        *(version.vectors for version in versions),
        *(subscriber.view(version.version.number) for version in versions),
        subscriber.view(),
        subscriber.versions,
    ]
    return [
        f"GRANT USAGE ON SCHEMA {quote_ident(subscriber.source.schema)} TO {role}",
        f"GRANT SELECT ON {', '.join(tables)} TO {role}",
        f"GRANT EXECUTE ON FUNCTION {subscriber.search}(text, integer, text) TO {role}",
    ]


def _indexes(versions: list[Pipeline]) -> str:
    """Return the indexes of the vectors.

    Those that learn from the vectors are left to the reader, after the copy.
    """
    lines = []
    for version in versions:
        if version.version.index_method == "none":
            continue
        # The subscriber's pgvector may be in another schema, so search_path finds it.
        index = replace(own_index(version, ""), operator_class=version.version.operator_class)
        statement = create_index_statement(version, index, 0, method="CREATE INDEX")
        if index.method == "ivfflat":
            lines.append(f"-- After the copy, with WITH (lists = rows / 1000): {statement};\n")
        else:
            lines.append(f"{statement};\n")
    return (
        "-- Indexes of the vectors. A large copy is faster if they are built after it.\n" + "".join(lines)
        if lines
        else ""
    )
