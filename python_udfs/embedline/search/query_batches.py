"""Ask one version many queries.

Its model embeds them in batches, and search's own ranker answers them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedline.catalog import progress
from embedline.catalog.values import Pipeline
from embedline.core import vectors
from embedline.core.media import MediaPart, ModelInput
from embedline.core.sql_text import quote_ident
from embedline.core.vectors import FloatMatrix
from embedline.errors import UnreadableMedia
from embedline.models.pool import embedder_for, let_cancel_through, wait_result
from embedline.postgres.session import Session
from embedline.search.ranking import Ranker

# Texts of one request. Queries are short, and a cancel is heeded between requests.
_REQUEST_TEXTS = 256


@dataclass(frozen=True)
class QueryVectors:
    """Queries as a version's model sees them, shape (queries, dimensions).

    `usable` marks those that have a direction.
    """

    matrix: FloatMatrix
    usable: npt.NDArray[np.bool_]

    def literal(self, query: int) -> str:
        """Return one in pgvector's text form."""
        return vectors.literal(self.matrix[query])


@dataclass
class Rankings:
    """The keys that each query finds, best first, and the seconds of each search."""

    keys: list[list[str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def embed_queries(session: Session, pipeline: Pipeline, texts: Sequence[ModelInput]) -> QueryVectors:
    """Embed the repaired texts as search embeds a query.

    The statement stays cancellable.
    """
    version, breathe = pipeline.version, let_cancel_through(session)
    embedder = embedder_for(session, version.model)
    requests = _requests(texts, min(version.model.config.max_batch_items, _REQUEST_TEXTS))
    futures = [embedder.submit([texts[place] for place in request], "query") for request in requests]
    parts = []
    for number, future in enumerate(futures):
        progress.report(session, "embedding the queries", sum(map(len, requests[:number])), len(texts))
        block = wait_result(future, breathe)
        if block.faults:
            raise UnreadableMedia(f"a query cannot be decoded: {next(iter(block.faults.values()))}")
        parts.append(vectors.matrix_from_bytes(block.data, block.count, block.dimensions))
    matrix = np.concatenate(parts)[np.argsort(list(itertools.chain(*requests)))]
    vectors.check_shape(matrix, len(texts), version.dimensions)
    ready, faults = vectors.usable_vectors(matrix, version.column_type, version.distance != "l2")
    usable = np.ones(len(texts), dtype=bool)
    usable[list(faults)] = False
    return QueryVectors(ready, usable)


def _requests(queries: Sequence[ModelInput], size: int) -> list[list[int]]:
    """Return the places of the queries of each request.

    A request has up to `size` texts, or a single file.
    """
    words = [place for place, query in enumerate(queries) if isinstance(query, str)]
    files = [[place] for place, query in enumerate(queries) if isinstance(query, MediaPart)]
    return [words[start : start + size] for start in range(0, len(words), size)] + files


def embedding_seconds(session: Session, pipeline: Pipeline, text: ModelInput) -> float:
    """Return the seconds that embedding one query takes, alone."""
    began = time.perf_counter()
    wait_result(embedder_for(session, pipeline.version.model).submit([text], "query"), let_cancel_through(session))
    return time.perf_counter() - began


def key_expression(pipeline: Pipeline, alias: str) -> str:
    """Return SQL for the key as search returns it.

    It is the column's text, or a JSON array of texts if there are several columns.
    """
    columns = ", ".join(f"{alias}.{quote_ident(pipeline.view_columns[c])}::text" for c in pipeline.key_columns)
    return columns if len(pipeline.key_columns) == 1 else f"pg_catalog.jsonb_build_array({columns})::text"


class DocumentSearch:
    """Run search(per_document => true) of one version, for many queries."""

    def __init__(self, session: Session, pipeline: Pipeline, queries: QueryVectors, k: int) -> None:
        self._ranker, self._queries, self._k = Ranker(session, pipeline), queries, k
        self.rankings = Rankings()

    def find(self, query: int) -> list[str]:
        """Return the keys of the k documents whose best chunks are nearest.

        None if the query has no direction.
        """
        if not self._queries.usable[query]:
            return []
        rows = self._ranker.nearest(self._queries.literal(query), self._k, per_document=True)
        return [str(row["key"]) for row in rows]

    def report(self, done: int, total: int) -> None:
        """Report the progress of ranking all queries."""
        progress.report(self._ranker.session, "ranking the queries", done, total)

    def measure(self, query: int) -> None:
        """Find, and keep the ranking and its seconds."""
        began = time.perf_counter()
        self.rankings.keys.append(self.find(query))
        self.rankings.seconds.append(time.perf_counter() - began)


def rank_all(searches: Sequence[DocumentSearch], queries: int) -> None:
    """Have each of the searches answer all queries in turns.

    So none has the quieter machine or the warmer cache.
    """
    for query in range(min(queries, 5)):
        for search in searches:
            search.find(query)
    for query in range(queries):
        for search in searches:
            search.report(query, queries)
            search.measure(query)
