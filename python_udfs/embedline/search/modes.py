"""Search by keywords, by both, with a filter or a reranker, or show the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from embedline.catalog.values import Pipeline
from embedline.errors import InvalidParameter
from embedline.models.reranking import Reranking
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.search import query_vector
from embedline.search.filters import FilteredRows
from embedline.search.fusion import best_of_documents, fuse
from embedline.search.keyword_ranking import KeywordRanker, require_index
from embedline.search.ranking import Ranker, Row, as_result, serving_ranker
from embedline.search.request import SearchRequest

# Factor by which the arms rank more chunks while too few documents are among them, and its end.
_MORE, _MOST = 4, 20_000
# Characters of a line of a plan; a vector is longer.
_PLAN_WIDTH = 200
Arm = Callable[[int], list[Row]]


def rank(session: Session, pipeline: Pipeline, request: SearchRequest) -> list[Row]:
    """Return the result of a search with one version, as search returns it."""
    if request.query is None:
        raise InvalidParameter("the query must not be NULL")
    mode = request.mode or pipeline.version.search_mode
    if mode != "vector":
        require_index(session, pipeline)
    filtered = None
    if request.filter is not None:
        filtered = FilteredRows(session, pipeline, request.filter, request.filter_search_path)
    semantic = _VectorArm(session, pipeline, request, filtered) if mode != "keyword" else None
    try:
        arms = _arms(session, pipeline, request, mode, semantic, filtered)
        if request.explain:
            return _plans(session, arms)
        wanted = request.k if request.reranker is None else max(request.k, request.reranked)
        rows = _enough(arms, request, wanted)
    except BaseException:
        # The keywords may fail, or be cancelled, while the provider works on the query's vector.
        if semantic is not None:
            semantic.cancel()
        raise
    if request.reranker is not None:
        rows = _reranked(session, pipeline, request, rows)
    return [
        {
            name: row.get(name)
            for name in ("key", "chunk", "score", "semantic_rank", "keyword_rank", "chunk_start", "chunk_end")
        }
        for row in rows[: request.k]
    ]


def find_documents(
    session: Session, pipeline: Pipeline, mode: str, query: str, vector: str | None, k: int
) -> list[str]:
    """Return the keys of the k best documents by a mode.

    They are those of search with its defaults. The query's vector is given; without one the vectors find nothing.
    """
    if mode != "vector":
        require_index(session, pipeline)
    request = SearchRequest.of_documents(query, k)
    ranker = Ranker(session, pipeline) if mode != "keyword" and vector is not None else None
    words = KeywordRanker(session, pipeline) if mode != "vector" else None
    if mode == "vector":
        rows = ranker.nearest(vector or "", k, per_document=True) if ranker else []
        return [str(row["key"]) for row in rows]
    semantic = None if ranker is None else lambda limit: ranker.nearest(vector or "", limit)
    keyword = None if words is None else lambda limit: words.nearest(query, limit)
    rows = _enough(_Arms(pipeline, semantic, keyword, None, list), request, k)
    return [str(row["key"]) for row in rows[:k]]


@dataclass(frozen=True)
class _Statement:
    """A statement that ranks, with its parameters, for EXPLAIN."""

    arm: str
    sql: str
    types: list[str]
    values: list[object]


@dataclass(frozen=True)
class _Arms:
    """What ranks: by vectors, by keywords, or both; each takes the number of chunks."""

    pipeline: Pipeline
    semantic: Arm | None
    keyword: Arm | None
    filtered: FilteredRows | None
    statements: Callable[[], list[_Statement]]


def _arms(
    session: Session,
    pipeline: Pipeline,
    request: SearchRequest,
    mode: str,
    semantic: _VectorArm | None,
    filtered: FilteredRows | None,
) -> _Arms:
    """Return the arms of a mode; `semantic` has asked the provider already."""
    words = KeywordRanker(session, pipeline, filtered) if mode != "vector" else None
    query = request.words

    def statements() -> list[_Statement]:
        found = [semantic.statement()] if semantic else []
        return found + ([_Statement("keyword", *words.statement_with_values(query, request.k))] if words else [])

    keyword = None if words is None else lambda limit: words.nearest(query, limit)
    return _Arms(pipeline, semantic.nearest if semantic else None, keyword, filtered, statements)


class _VectorArm:
    """The arm that ranks by vectors.

    The query's vector is waited for when the arm is first asked, so that the keywords are ranked meanwhile.
    """

    def __init__(
        self, session: Session, pipeline: Pipeline, request: SearchRequest, filtered: FilteredRows | None
    ) -> None:
        self._session, self._pipeline, self._k, self._filtered = session, pipeline, request.k, filtered
        self._pending = query_vector.start(session, pipeline, request.query)
        self._literal: str | None = None
        try:
            self._ranker = serving_ranker(session, pipeline, request.ef_search)
        except BaseException:
            self._pending.cancel()
            raise

    def nearest(self, limit: int) -> list[Row]:
        """Return the nearest chunks that the filter lets through."""
        if self._filtered is None:
            return self._ranker.nearest(self._vector(), limit)
        return self._filtered.nearest(self._ranker, self._vector(), limit)

    def cancel(self) -> None:
        """End the request for the query's vector, if it has not ended."""
        self._pending.cancel()

    def statement(self) -> _Statement:
        """Return the statement of the arm."""
        if self._filtered is None:
            return _Statement("vector", *self._ranker.statement_with_values(self._vector(), self._k))
        types = [f"{vector_schema(self._session)}.{self._pipeline.version.column_type}"]
        return _Statement("vector", self._filtered.chosen_statement(self._k), types, [self._vector()])

    def _vector(self) -> str:
        if self._literal is None:
            self._literal = query_vector.finish(self._pipeline, self._pending)
        return self._literal


def _enough(arms: _Arms, request: SearchRequest, wanted: int) -> list[Row]:
    """Return the best rows of the arms, `wanted` of them if there are so many.

    Documents are grouped after the fusion, so more chunks are ranked until there are enough documents.
    """
    window = max(request.window, wanted) if arms.semantic and arms.keyword else wanted
    if request.per_document and request.window_size is None:
        window = max(window, _MORE * wanted)
    while True:
        # Keywords first, because the provider works on the query's vector meanwhile.
        keyword = arms.keyword(window) if arms.keyword else []
        semantic = arms.semantic(window) if arms.semantic else []
        if arms.semantic and arms.keyword:
            rows = fuse(semantic, keyword, request.semantic_weight, request.keyword_weight, request.rrf_k)
        elif arms.semantic:
            rows = [{**row, **as_result(arms.pipeline, row, place)} for place, row in enumerate(semantic, 1)]
        else:
            rows = [{**row, "semantic_rank": None, "keyword_rank": place} for place, row in enumerate(keyword, 1)]
        if request.per_document:
            rows = best_of_documents(rows)
        is_all = len(semantic) < window and len(keyword) < window
        if len(rows) >= wanted or is_all or not request.per_document or window >= _MOST:
            return rows
        window *= _MORE


def _reranked(session: Session, pipeline: Pipeline, request: SearchRequest, rows: list[Row]) -> list[Row]:
    """Return the rows in the order of a reranker, whose score they get."""
    read = rows[: request.reranked]
    if not read:
        return []
    texts = [str(row["chunk"]) for row in read]
    pending = Reranking(session, str(request.reranker), request.words, texts, pipeline.pipeline_id)
    for row, score in zip(read, pending.result(), strict=True):
        row["score"] = score
    return sorted(read, key=lambda row: (-row["score"], str(row["key"]), row["chunk_id"]))


def _plans(session: Session, arms: _Arms) -> list[Row]:
    """Return the plans of the statements, a line in each row's chunk."""
    lines: list[str] = []
    for statement in arms.statements():
        ask = arms.filtered.run if arms.filtered else session.query
        rows = ask(f"EXPLAIN {statement.sql}", statement.types, *statement.values)
        lines += [f"{statement.arm}:", *(f"  {next(iter(row.values()))}"[:_PLAN_WIDTH] for row in rows)]
    empty = {"score": None, "semantic_rank": None, "keyword_rank": None, "chunk_start": None, "chunk_end": None}
    return [{"key": None, "chunk": line, **empty} for line in lines]
