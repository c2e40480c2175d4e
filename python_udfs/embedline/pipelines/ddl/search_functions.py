"""Generate the functions that rank a version's chunks, and its exact table.

    embedline_search.<pipeline>_v<n>_nearest(query, row_limit)                   by the index, as far as it reaches
    embedline_search.<pipeline>_v<n>_beside(query, row_limit, after, newest)    exactly, what the index may not reach
    embedline_search.<pipeline>_v<n>_search(query, row_limit, after, newest)    both of these, the best of them
    embedline_search.<pipeline>_v<n>_ranked(query, row_limit)                    exactly, all
    embedline_search.<pipeline>_v<n>_state(key)                                  whether searches find a row as it is now
    embedline_search.<pipeline>_v<n>_stored()                                    hash and prefix of each chunk, for an export
    embedline_data.<pipeline>_v<n>_exact                                         copies of vectors that are far from all others

They rank a version's table alone and join only the best rows with their source. So no estimate of a join can lead the
planner away from the index. With a key of two columns it expected 5 rows of 4,999, and ranked all of them exactly.

The functions run with their caller's rights, as the views do, and the planner inlines them. Their bodies are parsed when
they are created: a reader needs no right to name the tables. What a policy hides is left out after the ranking, so a
caller for whom row-level security is active ranks through the version's view instead.
"""

from __future__ import annotations

from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.pipelines.ddl import keyword_tables
from embedline.pipelines.ddl.plan import CapturePlan
from embedline.pipelines.ddl.row_functions import row_function_statements
from embedline.pipelines.ddl.view import SHOWN_TEXT, is_shown, shown_key
from embedline.postgres.readable import grant_select
from embedline.postgres.relations import SEARCH_SCHEMA, vector_schema
from embedline.postgres.session import Session

# Longest vector that is kept in its row: a page has 8 kB, and pgvector indexes no longer ones.
_INLINE_BYTES = 8000
# Rows of the table of exact ones that may be gone from the version since the last check, among the nearest.
_GONE = 200
SUFFIXES = ("nearest", "search", "beside", "ranked", "state", "stored")
_RETURNS = (
    "TABLE (chunk_id bigint, key text, chunk text, chunk_start integer, chunk_end integer,"
    " distance double precision, considered bigint)"
)


def exact_table_statements(pipeline: Pipeline, schema: str) -> list[str]:
    """Return the table of rows that every search ranks exactly.

    Vectors are copied into it, inline: 2,000 of 256 dimensions are ranked in 1.2 ms, through the version's primary key in
    3.8 ms. It has no foreign key, which would cost each DELETE a look-up; rows that are gone drop out in the join.
    """
    exact = pipeline.exact
    element = 2 if pipeline.version.column_type == "halfvec" else 4
    storage = "PLAIN" if element * pipeline.version.dimensions <= _INLINE_BYTES else "EXTERNAL"
    return [
        f"""CREATE TABLE {exact} (
            chunk_id bigint NOT NULL
                CONSTRAINT {quote_ident(_name(pipeline, "exact_pkey"))} PRIMARY KEY,
            embedding {schema}.{pipeline.version.vector_type} NOT NULL,
            similarity real
        )""",
        f"ALTER TABLE {exact} ALTER COLUMN embedding SET STORAGE {storage}",
        f"COMMENT ON TABLE {exact} IS 'Copies of vectors that a search of the index may not reach; all are ranked exactly'",
        f"COMMENT ON COLUMN {exact}.similarity IS"
        " 'How near the vector is to a sample of all; NULL: not looked at yet; -Infinity: a search has missed it'",
        f"REVOKE ALL ON TABLE {exact} FROM public",
    ]


def ranking_names(pipeline: Pipeline) -> list[str]:
    """Return the names of the functions that rank the pipeline's version."""
    return [_name(pipeline, suffix) for suffix in SUFFIXES]


def _name(pipeline: Pipeline, part: str) -> str:
    return names.of_version(pipeline.name, pipeline.version.number, part)


def function_statements(plan: CapturePlan, pipeline: Pipeline, schema: str) -> list[str]:
    """Return the statements that create the functions, or replace them."""
    vectors, column = pipeline.vectors, quote_ident(pipeline.version.column)
    distance = f"OPERATOR({schema}.{pipeline.version.operator}) query"
    by_index = (
        f"SELECT v.chunk_id, v.{column} {distance} AS distance FROM {vectors} AS v"
        f" ORDER BY v.{column} {distance} LIMIT row_limit"
    )
    # The sum is no expression of the index, so that the planner cannot take it.
    all_rows = (
        f"SELECT v.chunk_id, v.{column} {distance} AS distance FROM {vectors} AS v"
        f" ORDER BY (v.{column} {distance}) OPERATOR(pg_catalog.+) 0::double precision LIMIT row_limit"
    )
    exactly = (
        f"SELECT b.chunk_id, b.distance FROM (SELECT u.chunk_id, u.embedding {distance} AS distance FROM ("
        f"SELECT e.chunk_id, e.embedding FROM {pipeline.exact} AS e"
        f" UNION ALL (SELECT v.chunk_id, v.{column} FROM {vectors} AS v"
        " WHERE v.chunk_id OPERATOR(pg_catalog.>) after ORDER BY v.chunk_id DESC LIMIT newest)"
        f") AS u ORDER BY 2 LIMIT row_limit OPERATOR(pg_catalog.+) {_GONE}) AS b"
        f" WHERE EXISTS (SELECT FROM {vectors} AS v WHERE v.chunk_id OPERATOR(pg_catalog.=) b.chunk_id)"
        " ORDER BY b.distance LIMIT row_limit"
    )
    counted = "SELECT i.chunk_id, i.distance, count(*) OVER () AS considered FROM ({}) AS i"
    both = (
        "SELECT m.chunk_id, min(m.distance) AS distance, max(max(m.considered)) OVER () AS considered FROM ("
        f"({counted.format(by_index)}) UNION ALL SELECT b.chunk_id, b.distance, NULL FROM ({exactly}) AS b"
        ") AS m GROUP BY m.chunk_id ORDER BY 2 LIMIT row_limit"
    )
    query, new = f"query {schema}.{pipeline.version.column_type}, row_limit bigint", "after bigint, newest bigint"
    return [
        _function(plan, pipeline, "nearest", query, counted.format(by_index)),
        _function(plan, pipeline, "search", f"{query}, {new}", both),
        _function(plan, pipeline, "beside", f"{query}, {new}", counted.format(exactly)),
        _function(plan, pipeline, "ranked", query, counted.format(all_rows)),
    ]


def _function(plan: CapturePlan, pipeline: Pipeline, suffix: str, parameters: str, ranking: str) -> str:
    """Return a function around a ranking, which shows rows as the source does.

    The ranking gives (chunk_id, distance, considered).

    `considered` is the number of rows that the index had, or what ranks in its place: less than asked for means no more.
    """
    join = " AND ".join(f"c.{quote_ident(key.name)} = s.{quote_ident(key.source_name)}" for key in plan.keys)
    shown = shown_key(plan)
    return f"""CREATE OR REPLACE FUNCTION {pipeline.search_function(suffix)}({parameters})
        RETURNS {_RETURNS} LANGUAGE sql STABLE PARALLEL SAFE
        BEGIN ATOMIC
            SELECT n.chunk_id, {shown}, {SHOWN_TEXT}, c.start_offset, c.end_offset, n.distance, n.considered FROM ({ranking}) AS n
            JOIN {pipeline.chunk} AS c ON c.chunk_id OPERATOR(pg_catalog.=) n.chunk_id
            JOIN {plan.rows} AS s ON {join} WHERE {is_shown(plan, "c")};
        END"""


def create_search_functions(session: Session, pipeline: Pipeline, plan: CapturePlan, source: Source) -> None:
    """Create or replace the functions that rank the pipeline's version.

    Readers and the source's owner may use them.
    """
    schema = vector_schema(session)
    is_new = session.scalar("SELECT to_regclass($1) IS NULL", ["text"], pipeline.exact)
    for statement in (
        *(exact_table_statements(pipeline, schema) if is_new else ()),
        *function_statements(plan, pipeline, schema),
        *(keyword_tables.function_statements(plan, pipeline) if pipeline.keyword else ()),
        *row_function_statements(plan, pipeline),
    ):
        session.execute(statement)
    grantees = f"embedline_reader, {quote_ident(source.owner)}"
    functions = _functions(pipeline)
    session.execute(f"REVOKE ALL ON FUNCTION {functions} FROM public")
    grant_select(session, [pipeline.exact], source.owner)
    session.execute(f"GRANT EXECUTE ON FUNCTION {functions} TO {grantees}")
    session.execute(f"GRANT USAGE ON SCHEMA {SEARCH_SCHEMA} TO {quote_ident(source.owner)}")


def revoke_search_functions(session: Session, pipeline: Pipeline, role: str) -> None:
    """Revoke the rank functions from the owner that the source had before."""
    session.execute(f"REVOKE ALL ON FUNCTION {_functions(pipeline)} FROM {quote_ident(role)}")
    session.execute(f"REVOKE ALL ON {pipeline.exact} FROM {quote_ident(role)}")


def _functions(pipeline: Pipeline) -> str:
    suffixes = (*SUFFIXES, *(keyword_tables.FUNCTIONS if pipeline.keyword else ()))
    return ", ".join(pipeline.search_function(suffix) for suffix in suffixes)


def drop_search_functions(session: Session, pipeline: Pipeline) -> None:
    """Drop the functions that rank the pipeline's version.

    They go before the tables, which their bodies name.
    """
    drop_keyword_functions(session, pipeline)
    _drop(session, ranking_names(pipeline))
    session.execute(f"DROP TABLE IF EXISTS {pipeline.exact}")


def drop_keyword_functions(session: Session, pipeline: Pipeline) -> None:
    """Drop the functions that rank the version's chunks by keywords."""
    _drop(session, [_name(pipeline, suffix) for suffix in keyword_tables.FUNCTIONS])


def _drop(session: Session, functions: list[str]) -> None:
    rows = session.query(
        """
        SELECT p.oid::regprocedure::text AS signature FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE n.nspname = $1 AND p.proname = ANY ($2)
        """,
        ["text", "text[]"],
        SEARCH_SCHEMA,
        functions,
    )
    for row in rows:
        session.execute(f"DROP FUNCTION {row['signature']}")
