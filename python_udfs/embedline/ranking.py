"""Many queries against one version: its model embeds them in batches, its own view ranks with the plan that search has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedline import precision, progress, vectors
from embedline.catalog import Pipeline
from embedline.database import Session, quote_ident
from embedline.embedder_pool import embedder_for, let_cancel_through, wait_result
from embedline.errors import NotFound
from embedline.vectors import FloatMatrix

# Texts of one request: queries are short, and a cancel is heeded between requests.
_REQUEST_TEXTS = 256
# As search does it for documents: so many chunks for each document wanted, and four times as many where that is too few.
_OVERFETCH = 4
_MORE = 4
# Documents that score alike to so many digits stand in the order of their keys: as the tables hold them it would differ
# between two versions of the same vectors, and count as noise between two models.
_SCORE_DIGITS = 5


@dataclass(frozen=True)
class QueryVectors:
    """Queries as a version's model sees them: shape (queries, dimensions), and which have a direction at all."""

    matrix: FloatMatrix
    usable: npt.NDArray[np.bool_]

    def literal(self, query: int) -> str:
        """Return one in pgvector's text form."""
        return "[" + ",".join([f"{value:.9g}" for value in self.matrix[query].tolist()]) + "]"


@dataclass
class Rankings:
    """The keys that each query finds, best first, and the seconds that each search took."""

    keys: list[list[str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def embed_queries(session: Session, pipeline: Pipeline, texts: Sequence[str]) -> QueryVectors:
    """Embed the texts, which are repaired already, as search embeds a query; the statement stays cancellable."""
    version, breathe = pipeline.version, let_cancel_through(session)
    embedder = embedder_for(session, version.model)
    size = min(version.model.config.max_batch_items, _REQUEST_TEXTS)
    futures = [embedder.submit(texts[start : start + size], "query") for start in range(0, len(texts), size)]
    parts = []
    for number, future in enumerate(futures):
        progress.report(session, "embedding the queries", number * size, len(texts))
        block = wait_result(future, breathe)
        parts.append(vectors.matrix_from_bytes(block.data, block.count, block.dimensions))
    matrix = np.concatenate(parts)
    vectors.check_shape(matrix, len(texts), version.dimensions)
    ready, faults = vectors.usable_vectors(matrix, version.column_type, version.distance != "l2")
    usable = np.ones(len(texts), dtype=bool)
    usable[list(faults)] = False
    return QueryVectors(ready, usable)


def embedding_seconds(session: Session, pipeline: Pipeline, text: str) -> float:
    """Return how long one query's embedding takes, alone."""
    began = time.perf_counter()
    wait_result(embedder_for(session, pipeline.version.model).submit([text], "query"), let_cancel_through(session))
    return time.perf_counter() - began


def version_view(session: Session, pipeline: Pipeline) -> str:
    """Return the qualified name of the view over the pipeline's version alone."""
    name = session.scalar(
        "SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], pipeline.version.view_oid
    )
    if name is None:
        raise NotFound(
            f'the view of version {pipeline.version.number} of pipeline "{pipeline.name}" is gone',
            hint=f"SELECT embedline.refresh_pipeline('{pipeline.name}') makes it anew.",
        )
    return str(name)


def key_expression(pipeline: Pipeline, alias: str) -> str:
    """Return the key as search gives it: the column's text, or a JSON array of texts where there are several columns."""
    columns = ", ".join(f"{alias}.{quote_ident(pipeline.view_columns[c])}::text" for c in pipeline.key_columns)
    return columns if len(pipeline.key_columns) == 1 else f"pg_catalog.jsonb_build_array({columns})::text"


class DocumentSearch:
    """search(per_document => true) of one version, for many queries."""

    def __init__(self, session: Session, pipeline: Pipeline, queries: QueryVectors, k: int) -> None:
        self._session, self._queries, self._k = session, queries, k
        index = precision.chosen_index(session, pipeline)
        self._statement = precision.search_statement(session, pipeline, index, version_view(session, pipeline))
        self._ef_search = str(precision.ef_search(index, k * _OVERFETCH))
        self.rankings = Rankings()

    def find(self, query: int) -> list[str]:
        """Return the keys of the k documents whose best chunks are nearest; none where the query has no direction."""
        limit = self._k * _OVERFETCH
        vector = self._queries.literal(query)
        # The SQL function's SET clause puts the caller's value back.
        self._session.query("SELECT set_config('hnsw.ef_search', $1, true)", ["text"], self._ef_search)
        while self._queries.usable[query]:
            rows = self._session.query(self._statement, ["text", "bigint"], vector, limit)
            rows.sort(key=lambda row: (-round(row["score"], _SCORE_DIGITS), str(row["key"])))
            keys = list(dict.fromkeys(str(row["key"]) for row in rows))
            if len(keys) >= self._k or len(rows) < limit:
                return keys[: self._k]
            limit *= _MORE
        return []

    def report(self, done: int, total: int) -> None:
        """Say how far the ranking of all queries is."""
        progress.report(self._session, "ranking the queries", done, total)

    def measure(self, query: int) -> None:
        """Find, and keep the ranking and the time it took."""
        began = time.perf_counter()
        self.rankings.keys.append(self.find(query))
        self.rankings.seconds.append(time.perf_counter() - began)


def rank_all(searches: Sequence[DocumentSearch], queries: int) -> None:
    """Have each of the searches answer all queries in turns, so that none has the quieter machine or the warmer cache."""
    for query in range(min(queries, 5)):
        for search in searches:
            search.find(query)
    for query in range(queries):
        for search in searches:
            search.report(query, queries)
            search.measure(query)
