"""Rank the nearest chunks of a version, for search, the gate and measurements.

A ranking has two sources. The version's index gives the nearest rows that its graph reaches. Beside it, rows written
since the last check are ranked exactly. So are rows known to be far from all others (see search_functions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from embedline.catalog.values import Pipeline
from embedline.core.ivfflat import MAX_LISTS
from embedline.core.sql_text import quote_ident
from embedline.errors import NotFound
from embedline.indexes import lists, precision
from embedline.indexes.definitions import VectorIndex
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session

Row = dict[str, Any]
How = Literal["usual", "wide", "exact"]

# pgvector's bound of hnsw.ef_search, which is the number of rows that a scan finds before it starts again.
MAX_EF_SEARCH = 1000
# Until an index is measured. Recall@10 of 100,000 package summaries: 0.94 with 40, 0.98 with 100 (m 16, ef_construction
# 200).
DEFAULT_EF_SEARCH = 100
# Probes of a filtered scan for each one of a scan without a filter.
_FILTERED_PROBES = 2
# Chunks asked for at first for each document wanted, because one document may have many of the nearest.
OVERFETCH = 4
# Rows asked for beyond those wanted, so that the last of rows with one score are also ordered by their keys.
_SPARE = 10
# Factor by which more rows are asked for when a ranking gave too few, and its end in rows.
_MORE, _MOST = 4, 50_000
# Bytes of new vectors that are ranked exactly, in 1 to 2 ms; then the fewest new rows.
_NEW_BYTES, _FEWEST_NEW = 2_000_000, 64
# A chunk id that no chunk follows.
_NO_CHUNK = 2**63 - 1
# Digits to which equal distances agree, because pgvector adds up in float32.
_DIGITS = 5


def newest_rows(dimensions: int) -> int:
    """Return the most new rows of a version that are ranked exactly."""
    return max(_FEWEST_NEW, _NEW_BYTES // (4 * dimensions))


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Return rows best first, those with one score by key and chunk.

    So two versions of the same vectors agree.
    """
    return sorted(rows, key=lambda row: (round(row["distance"], _DIGITS), str(row["key"]), row["chunk_id"]))


def as_result(pipeline: Pipeline, row: Row, rank: int) -> Row:
    """Return a ranked row as search returns it; its score is higher the nearer it is."""
    offset = 1.0 if pipeline.version.distance == "cosine" else 0.0
    return {
        "key": row["key"], "chunk": row["chunk"], "score": offset - row["distance"], "semantic_rank": rank,
        "keyword_rank": None, "chunk_start": row["chunk_start"], "chunk_end": row["chunk_end"],
    }  # fmt: skip


def version_view(session: Session, pipeline: Pipeline) -> str:
    """Return the qualified name of the view over the pipeline's version alone.

    Raises NotFound if the view is gone.
    """
    name = session.scalar(
        "SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], pipeline.version.view_oid
    )
    if name is None:
        raise NotFound(
            f'the view of version {pipeline.version.number} of pipeline "{pipeline.name}" is gone',
            hint=f"SELECT embedline.refresh_pipeline('{pipeline.name}') creates it again.",
        )
    return str(name)


# Without an iterative scan, dead tuples and row-level security would shorten the result. The SET clauses of the SQL
# function restore the caller's values at its end.
_SCAN = {
    "hnsw": """
        SELECT set_config('hnsw.ef_search', $1, true), set_config('hnsw.iterative_scan', 'strict_order', true)
    """,
    # There is no strict order of it. Rows of one pass over the lists are in order, and in_order sorts those of several.
    "ivfflat": """
        SELECT set_config('ivfflat.probes', $1, true), set_config('ivfflat.iterative_scan', 'relaxed_order', true)
    """,
}


@dataclass(frozen=True)
class _Answer:
    """The result of one statement: rows in order; True if there are no more."""

    rows: list[Row]
    is_all: bool


def serving_ranker(session: Session, pipeline: Pipeline, ef_search: int | None) -> Ranker:
    """Return the ranker of a search.

    A caller's ef_search has no meaning for an index that is not HNSW.
    """
    index = precision.chosen_index(session, pipeline)
    return Ranker(session, pipeline, ef_search if index.method == "hnsw" else None, index)


class Ranker:
    """Rank one version with the index and the settings that serve it."""

    def __init__(
        self,
        session: Session,
        pipeline: Pipeline,
        effort: int | None = None,
        index: VectorIndex | None = None,
        *,
        ranks_new: bool = True,
    ) -> None:
        """Prepare for a version, with the index that search has chosen or the given one.

        An `effort` (ef_search or probes) given by a caller is used as it is, and nothing is searched again. A
        measurement of the index leaves new rows to the index (not `ranks_new`), because they are ranked exactly for a
        short time only.
        """
        self.session, self._pipeline, self._given, self._ranks_new = session, pipeline, effort, ranks_new
        self._index = index or precision.chosen_index(session, pipeline)
        self._vector_type = f"{vector_schema(session)}.{pipeline.version.column_type}"
        # Rows that a policy hides would be left out after the ranking. The view's plan takes the policy into account.
        self._through_view = self._index.precision is not None or bool(
            session.scalar("SELECT row_security_active($1::oid)", ["bigint"], pipeline.source_oid)
        )
        self._view = version_view(session, pipeline) if self._through_view else ""

    def nearest(self, vector: str, k: int, *, per_document: bool = False, how: How | None = None) -> list[Row]:
        """Return the k nearest chunks, or the best chunk of the k nearest documents.

        Rows are of chunk_id, key, chunk, chunk_start, chunk_end, distance. If the best hit of a query is farther than
        those of usual queries, it is ranked again, wider or exactly. `how` chooses one of these for all.
        """
        reach = self._pipeline.version.reach
        rows = self._enough(vector, k, per_document, how or "usual")
        if how is not None or self._given is not None or reach is None or reach.far_distance is None:
            return rows
        is_usual = bool(rows) and rows[0]["distance"] <= reach.far_distance
        if is_usual or reach.wide_effort == reach.effort:
            return rows
        return self._enough(vector, k, per_document, "exact" if reach.wide_effort is None else "wide")

    def plan(self, vector: str, k: int, how: How = "usual") -> str:
        """Return the planner's plan of a ranking, as JSON."""
        statement, types, values = self.statement_with_values(vector, k, how)
        rows = self.session.query(f"EXPLAIN (FORMAT json) {statement}", types, *values)
        return str(next(iter(rows[0].values())))

    def statement_with_values(self, vector: str, k: int, how: How = "usual") -> tuple[str, list[str], list[object]]:
        """Return the query for the k nearest chunks with its parameters."""
        after = self._after() if how != "exact" else None
        types = [self._vector_type, "bigint"] if after is not None else [self._vector_type]
        values: list[object] = [vector, after] if after is not None else [vector]
        return self.statement(k + _SPARE, how), types, values

    def _enough(self, vector: str, k: int, per_document: bool, how: How) -> list[Row]:
        limit = k * OVERFETCH if per_document else k
        while True:
            answer = self._ask(vector, limit, how)
            rows = answer.rows
            if per_document:
                best: dict[str, Row] = {}
                for row in rows:
                    best.setdefault(row["key"], row)
                rows = list(best.values())
            if len(rows) >= k or answer.is_all or limit > _MOST:
                return rows[:k]
            limit *= _MORE

    def prepare(self, limit: int, how: How = "usual") -> None:
        """Set how far the transaction's scans search for the nearest `limit` rows."""
        self.session.query(_SCAN[self._index.method], ["text"], str(self.effort(limit, how)))

    def prepare_filtered(self, limit: int, candidates: float) -> None:
        """Set how far scans search that a filter thins out.

        Of their nearest rows the later ones count, too.
        """
        if self._index.method == "ivfflat":
            effort = min(_FILTERED_PROBES * self.effort(int(candidates)), MAX_LISTS)
        else:
            effort = int(min(max(candidates, self.effort(limit)), MAX_EF_SEARCH))
        self.session.query(_SCAN[self._index.method], ["text"], str(effort))

    def effort(self, limit: int, how: How = "usual") -> int:
        """Return hnsw.ef_search, or ivfflat.probes, for the nearest `limit` rows."""
        if self._given is not None:
            return self._given
        if self._index.precision is not None:
            return precision.ef_search(self._index, limit)
        reach = self._pipeline.version.reach
        measured = None if reach is None else reach.wide_effort if how == "wide" else reach.effort
        if self._index.method == "ivfflat":
            return lists.probes(self.session, self._index, measured, limit)
        # Twice the rows: recall@10 of the manual's index terms was 0.768 with 40 for 40 rows, 0.780 with 80 (exact
        # 0.793).
        return min(max(measured or DEFAULT_EF_SEARCH, 2 * limit), MAX_EF_SEARCH)

    def _ask(self, vector: str, limit: int, how: How) -> _Answer:
        if how != "exact":
            self.prepare(limit, how)
        after = self._after() if how != "exact" else None
        statement = self.statement(limit + _SPARE, how)
        if after is None:
            found = self.session.query(statement, [self._vector_type], vector)
        else:
            found = self.session.query(statement, [self._vector_type, "bigint"], vector, after)
        return _Answer(_distinct(found), self._is_all(found, limit + _SPARE))

    def _after(self) -> int | None:
        """Return the chunk after which new ones are ranked exactly.

        None if the version has no index to add them to.
        """
        version = self._pipeline.version
        if not version.has_index:
            return None
        return (version.reach.checked_to if version.reach else 0) if self._ranks_new else _NO_CHUNK

    def statement(self, limit: int, how: How = "usual") -> str:
        """Return the query for the nearest `limit` chunks.

        $1 is the vector, $2 the chunk after which chunks are new. The limit is a constant, so that the planner knows
        it. The vector is a parameter of its own type, because a text would be parsed once for each row. For 5,000 rows
        of 384 dimensions that took 124 ms in place of 27.
        """
        newest = newest_rows(self._pipeline.version.dimensions)
        has_beside = how != "exact" and self._after() is not None
        if not self._through_view:
            suffix = "ranked" if how == "exact" else "search" if has_beside else "nearest"
            arguments = f"$1, {limit}, $2, {newest}" if has_beside else f"$1, {limit}"
            return f"SELECT r.*, 'index' AS source FROM {self._function(suffix)}({arguments}) AS r"
        index = self._view_statement(limit, is_exact=how == "exact")
        if not has_beside:
            return index
        # If policies hide rows, the nearest ones may all be hidden, so all are ranked and joined.
        return f"({index}) UNION ALL SELECT r.*, 'beside' FROM {self._function('beside')}($1, NULL, $2, {newest}) AS r"

    def _function(self, suffix: str) -> str:
        return self._pipeline.search_function(suffix)

    def _view_statement(self, limit: int, *, is_exact: bool) -> str:
        names = self._pipeline.view_columns
        keys = ", ".join(f"e.{quote_ident(names[c])}::text" for c in self._pipeline.key_columns)
        key = keys if len(self._pipeline.key_columns) == 1 else f"pg_catalog.jsonb_build_array({keys})::text"
        columns = {
            "chunk_id": f"e.{quote_ident(names['chunk_id'])}",
            "key": key,
            **{name: f"e.{quote_ident(names[name])}" for name in ("chunk", "chunk_start", "chunk_end")},
        }
        view = precision.RankedRelation(f"{self._view} AS e", f"e.{quote_ident(names['embedding'])}", columns)
        ranked = precision.ranked_rows(self.session, self._pipeline, self._index, view, limit, is_exact=is_exact)
        return f"SELECT n.*, NULL::bigint AS considered, 'index' AS source FROM ({ranked}) AS n"

    @staticmethod
    def _is_all(found: Sequence[Row], limit: int) -> bool:
        """Return True if the index, or the ranking in its place, has no more rows."""
        of_index = [row for row in found if row["source"] == "index"]
        if of_index and of_index[0]["considered"] is not None:
            return int(of_index[0]["considered"]) < limit
        # If functions returned no row at all, they may have had hidden ones; the caller's bound ends the search.
        return len(of_index) < limit and (bool(of_index) or limit > _MOST)


def _distinct(found: Sequence[Row]) -> list[Row]:
    return in_order(list({row["chunk_id"]: row for row in found}.values()))
