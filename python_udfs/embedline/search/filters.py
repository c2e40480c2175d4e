"""Rank by vectors what a filter lets through.

The filter is an SQL condition of the caller over the columns of the source. It runs in statements of the caller's session,
with the caller's rights and search_path, over the version's view.

Few rows are ranked exactly, because an index scan would pass most of its rows in vain. More rows are found by an iterative
scan of the index. The planner's estimate decides; if the scan gives too few, all are ranked exactly after all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.errors import InvalidParameter
from embedline.indexes import precision
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import INSUFFICIENT_PRIVILEGE, sqlstate_of
from embedline.search.query_batches import key_expression
from embedline.search.ranking import Ranker, Row, in_order, newest_rows, version_view

# Chunks that are ranked exactly: 1,000 of 256 dimensions take 20 ms, 10,000 take 50 ms, most of it for joins.
_FEW = 5_000
# Candidates of the index for each row wanted, beyond what the filter takes out. Recall@10 of a filter on 10 % of 100,000 rows
# was 0.965 without.
_EF_FACTOR = 6
_CHUNKS = "SELECT reltuples FROM pg_class WHERE relname = $1 AND relnamespace = 'embedline_data'::regnamespace"
_SPARE = 10
# Classes of errors that an expression raises: of its syntax and names, of its values, of what PostgreSQL does not offer.
_FILTERS_FAULT = ("42", "22", "0A")
_LIMITS = """
    SELECT set_config('hnsw.max_scan_tuples', '1000000', true), set_config('hnsw.scan_mem_multiplier', '16', true)
"""


class FilteredRows:
    """The rows of one version that a filter lets through."""

    def __init__(self, session: Session, pipeline: Pipeline, condition: str, search_path: str) -> None:
        """Prepare for a condition that is a single expression (core.expression)."""
        self._session, self._pipeline = session, pipeline
        self._condition, self._search_path = condition, search_path
        columns = pipeline.view_columns
        self._column = {
            name: f"e.{quote_ident(columns[name])}" for name in ("chunk_id", "chunk", "chunk_start", "chunk_end")
        }
        self._embedding = f"e.{quote_ident(columns['embedding'])}"
        self._relation = f"{version_view(session, pipeline)} AS e"

    def lets_through(self, chunk_id: str) -> str:
        """Return the condition that the filter lets a chunk through; its id is `chunk_id`."""
        return f"EXISTS (SELECT FROM {self._relation} WHERE {self._column['chunk_id']} = {chunk_id} AND ({self._condition}\n))"

    @contextmanager
    def as_caller(self) -> Iterator[None]:
        """Let names in the filter resolve as in the caller's session."""
        before = self._session.scalar("SELECT current_setting('search_path')")
        self._session.query("SELECT set_config('search_path', $1, true)", ["text"], self._search_path)
        yield
        self._session.query("SELECT pg_catalog.set_config('search_path', $1, true)", ["text"], before)

    def run(self, sql: str, types: list[str], *values: Any) -> list[Row]:
        """Run a statement with the filter in it; its plan is not kept."""
        with self.as_caller():
            try:
                plan = self._session.plpy.prepare(sql, types)
                return list(self._session.plpy.execute(plan, list(values)))
            except Exception as error:
                state = sqlstate_of(error)
                if not state.startswith(_FILTERS_FAULT) or state == INSUFFICIENT_PRIVILEGE:
                    raise
                refused = InvalidParameter(
                    f"the filter cannot be evaluated: {error}",
                    hint="It is a condition over the columns of the pipeline's view, for example filter => 'id > 10'.",
                )
                refused.sqlstate = state
                raise refused from None

    def estimate(self) -> int:
        """Return how many chunks the planner expects."""
        rows = self.run(f"EXPLAIN (FORMAT json) SELECT FROM {self._relation} WHERE ({self._condition}\n)", [])
        plan = next(iter(rows[0].values()))
        found: int = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]["Plan Rows"]
        return found

    def nearest(self, ranker: Ranker, vector: str, k: int) -> list[Row]:
        """Return the k nearest chunks, as Ranker.nearest does."""
        expected = self.estimate()
        if self._are_few(expected):
            return self._exactly(vector, k)
        self._session.query(_LIMITS)
        ranker.prepare_filtered(k, int(_EF_FACTOR * k * self._chunks() / expected))
        types = [f"{vector_schema(self._session)}.{self._pipeline.version.column_type}"]
        found = self.run(self.statement(k, is_exact=False), types, vector)
        if len(found) < k:
            return self._exactly(vector, k)
        return in_order(list({row["chunk_id"]: row for row in [*found, *self._beside(ranker, vector, k)]}.values()))[:k]

    def _are_few(self, expected: int) -> bool:
        return not self._pipeline.version.has_index or expected <= _FEW

    def _chunks(self) -> float:
        """Return about how many chunks there are."""
        name = names.generated(self._pipeline.name, names.chunk_suffix(self._pipeline.chunk_set.number))
        return max(float(self._session.scalar(_CHUNKS, ["name"], name) or 0), 1.0)

    def chosen_statement(self, k: int) -> str:
        """Return the query that `nearest` begins with."""
        return self.statement(k, is_exact=self._are_few(self.estimate()))

    def statement(self, k: int, *, is_exact: bool) -> str:
        """Return the query for the nearest k chunks by vectors; $1 is the vector."""
        shown = {**self._column, "key": key_expression(self._pipeline, "e")}
        through = f"(SELECT * FROM {self._relation} WHERE ({self._condition}\n)) AS e"
        view = precision.RankedRelation(through, self._embedding, shown)
        own = precision.chosen_index(self._session, self._pipeline)
        return precision.ranked_rows(self._session, self._pipeline, own, view, k + _SPARE, is_exact=is_exact)

    def _exactly(self, vector: str, k: int) -> list[Row]:
        types = [f"{vector_schema(self._session)}.{self._pipeline.version.column_type}"]
        return in_order(self.run(self.statement(k, is_exact=True), types, vector))[:k]

    def _beside(self, ranker: Ranker, vector: str, k: int) -> list[Row]:
        """Return the nearest of the rows that the index may not reach."""
        version = self._pipeline.version
        after = version.reach.checked_to if version.reach else 0
        function = self._pipeline.search_function("beside")
        sql = (
            f"SELECT r.* FROM {function}($1, NULL, $2, {newest_rows(version.dimensions)}) AS r"
            f" WHERE {self.lets_through('r.chunk_id')} ORDER BY r.distance LIMIT {k + _SPARE}"
        )
        return self.run(sql, [f"{vector_schema(self._session)}.{version.column_type}", "bigint"], vector, after)
