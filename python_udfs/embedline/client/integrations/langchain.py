"""Bring pipelines to LangChain: a retriever and a vector store.

The retriever works over any pipeline; the store owns a table that a pipeline watches. The model of the pipeline
embeds, in the database. So neither takes an `Embeddings` of LangChain.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from pydantic import ConfigDict, Field, PrivateAttr

from embedline.client.integrations import document_table
from embedline.client.integrations.database import Database, Pool, Row
from embedline.client.integrations.document_table import (
    Wait,
    create_document_table,
    metadata_has,
    open_document_table,
)
from embedline.client.integrations.search_call import search_call, shown

__all__ = ["EmbedlineRetriever", "EmbedlineVectorStore"]


class EmbedlineRetriever(BaseRetriever):
    """The nearest chunks of a pipeline to a text.

    A document's text is the chunk, its id the key of the source row, and its metadata has the score and the ranks.
    `mode` is "vector", "keyword" or "hybrid"; without it the pipeline's. `options` are further arguments of
    `embedline.search`, such as `per_document` or `filter`; `invoke` takes all of these.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    connection: Any = Field(repr=False, exclude=True)
    """A connection string of libpq, or a psycopg_pool.ConnectionPool of the application's. Traces never show it."""
    pipeline: str
    k: int = Field(default=10, ge=1)
    mode: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    _database: Database = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Open the pool."""
        super().model_post_init(context)
        self._database = Database(self.connection)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **options: Any
    ) -> list[Document]:
        asked = {"mode": self.mode, **self.options, **options}
        found = self._database.rows(
            f"SELECT * FROM {search_call(asked)}",
            {"pipeline": self.pipeline, "query": query, "k": self.k if k is None else k, **asked},
        )
        return [Document(page_content=row["chunk"], id=row["key"], metadata=shown(row)) for row in found]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        return await run_in_executor(
            None, self._get_relevant_documents, query, run_manager=run_manager.get_sync(), **options
        )

    def close(self) -> None:
        """Close the pool if it was made from a connection string."""
        self._database.close()


class EmbedlineVectorStore(VectorStore):
    """A table of documents that a pipeline watches.

    `wait` says who embeds an added document. "embed" is the call itself, for which the role needs embedline_worker.
    "worker" waits for a resident worker; "none" does not wait. Other programs may write to the table as well.
    """

    def __init__(self, connection: str | Pool, name: str, *, wait: Wait = "embed", wait_seconds: float = 60.0) -> None:
        """Open the store of a name that `create` made.

        Raises LookupError if there is none.
        """
        self._database = Database(connection)
        self._documents = open_document_table(self._database, name, wait, wait_seconds)

    @classmethod
    def create(
        cls, connection: str | Pool, name: str, model: str, *, wait: Wait = "embed", **options: Any
    ) -> EmbedlineVectorStore:
        """Create the table and its pipeline, each unless it is there, and open the store.

        `model` is one that `embedline.create_model` registered. `options` are further arguments of `create_pipeline`.
        """
        with Database(connection) as database:
            create_document_table(database, name, model, options)
        return cls(connection, name, wait=wait)

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[Any, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> EmbedlineVectorStore:
        """Create a store with these texts; further arguments are those of `create`.

        Raises ValueError for an embedding, because the pipeline's model embeds.
        """
        if embedding is not None:
            raise ValueError("the model of the pipeline embeds: pass embedding=None, and model= with its name")
        store = cls.create(**kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[Any, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Write texts over those of the same ids, and return the ids.

        Commits, and sees to their vectors. A text without an id gets one. Raises NotEmbedded if there are no vectors
        in time; the rows stay.
        """
        given = list(texts)
        named = [found or str(uuid.uuid4()) for found in (ids or [None] * len(given))]
        self._documents.put(
            [
                document_table.Document(id, text, metadata)
                for id, text, metadata in zip(named, given, metadatas or [{}] * len(given), strict=True)
            ]
        )
        return named

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents, all of them without ids; no search finds them from then on."""
        self._documents.delete(ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the documents that are there, embedded or not."""
        return [_document(found) for found in self._documents.get(ids)]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Return the documents whose best chunks are nearest to a text.

        Takes the arguments of `similarity_search_with_score`.
        """
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Return the nearest documents with their scores, higher for nearer.

        The score is the cosine unless `mode` says otherwise. `filter` is what a document's metadata must have.
        Further arguments are those of `embedline.search`, such as `mode`, `semantic_weight` or `reranker`.
        """
        condition = metadata_has(filter) if filter else None
        found = self._documents.nearest(query, k, condition, kwargs)
        return [(_of_row(row), float(row["score"])) for row in found]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Return documents that are near to a text and unlike each other.

        They are chosen of the `fetch_k` nearest. `lambda_mult` is 1 for the nearest, 0 for the most different ones.
        """
        import numpy

        nearest = self.similarity_search(query, fetch_k, **kwargs)
        asked, vectors = self._documents.vectors(query, [found.id for found in nearest if found.id])
        # A document that was deleted in between has no vector any more.
        kept = [found for found in nearest if found.id in vectors]
        if not kept:
            return []
        of_kept = [vectors[found.id or ""] for found in kept]
        chosen = maximal_marginal_relevance(numpy.array(asked), of_kept, lambda_mult=lambda_mult, k=k)
        return [kept[place] for place in chosen]

    def _select_relevance_score_fn(self) -> Any:
        # Scores of `search` are similarities already, not distances.
        return float

    def close(self) -> None:
        """Close the pool if it was made from a connection string."""
        self._database.close()


def _document(found: document_table.Document) -> Document:
    return Document(page_content=found.content, id=found.id, metadata=dict(found.metadata))


def _of_row(row: Row) -> Document:
    return _document(document_table.document_of(row))
