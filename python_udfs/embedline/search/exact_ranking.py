"""Search all vectors of a version exactly, for many queries in one pass.

numpy ranks a page of vectors at a time. A sequential scan with a sort for each query would read the table once per
query; this reads it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedline.catalog import progress
from embedline.catalog.values import Pipeline
from embedline.core import vectors
from embedline.core.sql_text import quote_ident
from embedline.core.vectors import FloatMatrix
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.search.query_batches import QueryVectors, key_expression
from embedline.search.ranking import version_view

# Vectors read at a time: 384 dimensions take 12 MB, the distances of 200 queries 13 MB.
_PAGE = 8192
# Nearest chunks kept for each document wanted, because a document may have many of them.
_CHUNKS_KEPT = 16


@dataclass(frozen=True)
class Page:
    """Some of a version's chunks.

    They have ids, the keys of their documents, and vectors of shape (chunks, dimensions).
    """

    chunk_ids: npt.NDArray[np.int64]
    keys: list[str]
    matrix: FloatMatrix


def read_pages(session: Session, pipeline: Pipeline) -> Iterator[Page]:
    """Yield all chunks of the version that its reader may see, by chunk_id."""
    names = pipeline.view_columns
    chunk_id, embedding = f"e.{quote_ident(names['chunk_id'])}", f"e.{quote_ident(names['embedding'])}"
    column_type = pipeline.version.column_type
    statement = f"""
        SELECT {chunk_id} AS chunk_id, {key_expression(pipeline, "e")} AS key,
            {vector_schema(session)}.{column_type}_send({embedding}) AS vector
        FROM {version_view(session, pipeline)} AS e WHERE {chunk_id} > $1 ORDER BY {chunk_id} LIMIT $2
    """
    last, read = -1, 0
    progress.report(session, "reading all vectors", read, None)
    while rows := session.query(statement, ["bigint", "bigint"], last, _PAGE):
        read += len(rows)
        progress.report(session, "reading all vectors", read, None)
        ids = np.array([row["chunk_id"] for row in rows], dtype=np.int64)
        matrix = vectors.vectors_from_send([row["vector"] for row in rows], column_type)
        yield Page(ids, [str(row["key"]) for row in rows], matrix)
        last = int(ids[-1])


def distances(queries: FloatMatrix, stored: FloatMatrix, distance: str) -> npt.NDArray[np.float64]:
    """Return pgvector's distances, shape (queries, stored).

    They are 1 - cosine, minus the inner product, or Euclidean.
    """
    left, right = queries.astype(np.float64), stored.astype(np.float64)
    products = left @ right.T
    if distance == "inner_product":
        negative: npt.NDArray[np.float64] = -products
        return negative
    squares, lengths = np.einsum("ij,ij->i", left, left), np.einsum("ij,ij->i", right, right)
    if distance == "cosine":
        cosines: npt.NDArray[np.float64] = products / np.sqrt(squares)[:, np.newaxis] / np.sqrt(lengths)
        return 1 - cosines
    euclidean: npt.NDArray[np.float64] = np.sqrt(np.maximum(squares[:, np.newaxis] + lengths - 2 * products, 0))
    return euclidean


def as_stored(queries: FloatMatrix, column_type: str) -> FloatMatrix:
    """Return the queries as the column's type rounds them."""
    return queries.astype(np.float16).astype(np.float32) if column_type == "halfvec" else queries


def nearest_distances(session: Session, pipeline: Pipeline, queries: FloatMatrix, k: int) -> npt.NDArray[np.float64]:
    """Return the k smallest distances of each query in order, shape (queries, k).

    There are fewer if there are fewer vectors.
    """
    version = pipeline.version
    rounded = as_stored(queries, version.column_type)
    nearest = np.empty((len(queries), 0))
    for page in read_pages(session, pipeline):
        nearest = np.hstack([nearest, distances(rounded, page.matrix, version.distance)])
        if nearest.shape[1] > k:
            nearest = np.partition(nearest, k - 1, axis=1)[:, :k]
    return np.sort(nearest, axis=1)


class ExactRanking:
    """The documents that many queries find by exact search, each by its best chunk.

    Vectors are added page by page.
    """

    def __init__(self, queries: QueryVectors, column_type: str, distance: str, k: int) -> None:
        self._queries, self._distance, self._k = queries, distance, k
        self._matrix = as_stored(queries.matrix, column_type)
        self._numbers: dict[str, int] = {}
        count = len(queries.matrix)
        self._nearest, self._documents = np.empty((count, 0)), np.empty((count, 0), dtype=np.int64)

    def add(self, keys: Sequence[str], matrix: FloatMatrix) -> None:
        """Add chunks of documents with these keys, one row of `matrix` each."""
        numbers = [self._numbers.setdefault(key, len(self._numbers)) for key in keys]
        # A query or a mapped vector without a direction is near to nothing.
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.nan_to_num(distances(self._matrix, matrix, self._distance), nan=np.inf)
        nearest = np.hstack([self._nearest, found])
        documents = np.hstack([self._documents, np.broadcast_to(np.array(numbers, dtype=np.int64), found.shape)])
        keep = self._k * _CHUNKS_KEPT
        if nearest.shape[1] > keep:
            places = np.argpartition(nearest, keep - 1, axis=1)[:, :keep]
            nearest, documents = np.take_along_axis(nearest, places, 1), np.take_along_axis(documents, places, 1)
        self._nearest, self._documents = nearest, documents

    def keys(self) -> list[list[str]]:
        """Return the keys of the k nearest documents of each query, best first."""
        names = list(self._numbers)
        order = np.argsort(self._nearest, axis=1, kind="stable")
        ranked = np.take_along_axis(self._documents, order, 1)
        return [
            [names[number] for number in list(dict.fromkeys(row.tolist()))[: self._k]] if usable else []
            for row, usable in zip(ranked, self._queries.usable, strict=True)
        ]
