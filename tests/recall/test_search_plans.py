"""A search takes the index for every kind of key and at every size, and goes on to after its fifth call.

From the sixth execution on the planner may take a plan that knows no parameter. The vectors are put in directly, of eight
dimensions and with a small graph, so that 300,000 rows take seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from embedline.client.build_index import PsycopgClient, build
from generated_names import PAGE
from stub_provider import StubProvider
from support import create_pipeline, scalar
from working import create_stub_model

DIMENSIONS = 8
# Name: definition of the key columns, their values for row n, and the columns of the generated tables.
KEYS = {
    "integer": ("id integer PRIMARY KEY", "n", "key_id"),
    "uuid": ("id uuid PRIMARY KEY", "md5(n::text)::uuid", "key_id"),
    "text": ("id text PRIMARY KEY", "'page ' || n", "key_id"),
    "two columns": ("tenant integer, id bigint, PRIMARY KEY (tenant, id)", "n % 1000, n", "key_tenant, key_id"),
}
# Plan and rows of the ranking that search makes, after as many calls.
RANKING = """
    CREATE FUNCTION test_search_plan(query text, k integer, per_document boolean, calls integer)
    RETURNS TABLE (plan json, found bigint)
    LANGUAGE plpython3u AS $python$
        from embedline.catalog import load as catalog
        from embedline.search import ranking as nearest
        from embedline.postgres.session import Session
        session = Session(plpy, GD)
        ranker = nearest.Ranker(session, catalog.load_pipeline(session, "page"))
        for _ in range(calls):
            found = ranker.nearest(query, k, per_document=per_document)
            plan = ranker.plan(query, k * nearest.OVERFETCH if per_document else k)
        return [(plan, len(found))]
    $python$
"""


@dataclass(frozen=True)
class Filled:
    """A pipeline with a valid index."""

    connection: psycopg.Connection
    rows: int

    def plan(self, k: int, *, per_document: bool, calls: int = 7) -> str:
        """Return the plan of the last of several calls, as JSON."""
        query = "[" + ",".join(["0.5"] * DIMENSIONS) + "]"
        call = "SELECT plan, found FROM test_search_plan(%s, %s, %s, %s)"
        row = self.connection.execute(call, (query, k, per_document, calls)).fetchone()
        assert row is not None
        assert row[1] == k
        return json.dumps(row[0])


def _read_whole(plan: str) -> set[str]:
    """Return the tables that a plan reads from end to end."""
    found, nodes = set(), [json.loads(plan)[0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if node["Node Type"] == "Seq Scan":
            found.add(node["Relation Name"])
    return found


@pytest.fixture(
    scope="module",
    params=[(key, 1_000) for key in KEYS]
    + [(key, 60_000) for key in KEYS]
    + [("text", 300_000), ("two columns", 300_000)],
    ids=lambda parameter: f"{parameter[0]}, {parameter[1]}",
)
def filled(
    module_database: psycopg.Connection, running_stub: StubProvider, request: pytest.FixtureRequest
) -> Iterator[Filled]:
    """A pipeline of this key and size."""
    (key, rows), connection = request.param, module_database
    definition, values, columns = KEYS[key]
    connection.execute("DROP FUNCTION IF EXISTS test_search_plan")
    connection.execute(RANKING)
    if not scalar(connection, "SELECT count(*) FROM embedline.model WHERE name = 'narrow'"):
        create_stub_model(connection, running_stub, "narrow")
    connection.execute(f"CREATE TABLE page ({definition.replace(', PRIMARY', ', body text, PRIMARY', 1)})")
    if key != "two columns":
        connection.execute("ALTER TABLE page ADD COLUMN body text")
    create_pipeline(connection, content="body", model="narrow", index_options='{"m": 2, "ef_construction": 4}')
    connection.execute("SELECT embed_pending(1)")
    connection.execute("ALTER TABLE page DISABLE TRIGGER USER")
    names = "tenant, id, body" if key == "two columns" else "id, body"
    connection.execute(f"INSERT INTO page ({names}) SELECT {values}, 'body' FROM generate_series(1, {rows}) AS n")
    connection.execute(
        f"INSERT INTO {PAGE('chunk')} (chunk_id, {columns}, seq, start_offset, end_offset, content_hash, content)"
        f" SELECT n, {values}, 0, 0, 4, md5(n::text)::uuid, 'body' FROM generate_series(1, {rows}) AS n"
    )
    axes = ", ".join(f"random() + 0 * n AS x{axis}" for axis in range(DIMENSIONS))
    array = ", ".join(f"x{axis}" for axis in range(DIMENSIONS))
    with connection.transaction():
        # The foreign key would look up each of these chunks.
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute(
            f"INSERT INTO {PAGE.version(1)} SELECT n, ARRAY[{array}]::vector"
            f" FROM (SELECT n, {axes} FROM generate_series(1, {rows}) AS n) AS r"
        )
    assert build(PsycopgClient(connection), "page") is not None
    connection.execute(f"ANALYZE page, {PAGE('chunk')}, {PAGE.version(1)}")
    checked = "INSERT INTO embedline.index_reach (version_id, checked_to) SELECT version_id, %s FROM embedline.version"
    connection.execute(checked, (rows,))
    yield Filled(connection, rows)
    connection.execute("SELECT embedline.drop_pipeline('page')")
    connection.execute("DROP TABLE page")


@pytest.mark.parametrize(("k", "per_document"), [(10, False), (50, True)])
def test_the_ranking_joins_only_what_it_found(filled: Filled, k: int, per_document: bool) -> None:
    plan = filled.plan(k, per_document=per_document)
    if filled.rows > 1_000:
        assert "page_v1_embedding_idx" in plan
        assert _read_whole(plan) <= {"page_v1_exact"}


def test_the_routing_view_takes_the_index(filled: Filled) -> None:
    statement = "SELECT id FROM page_embedding ORDER BY embedding <=> %s::vector LIMIT 10"
    query = "[" + ",".join(["0.5"] * DIMENSIONS) + "]"
    filled.connection.prepare_threshold = None
    plan = json.dumps(scalar(filled.connection, f"EXPLAIN (FORMAT json) {statement}", (query,)))
    if filled.rows > 1_000:
        assert "page_v1_embedding_idx" in plan
        assert not _read_whole(plan)
