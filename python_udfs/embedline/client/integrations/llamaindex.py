"""Bring pipelines to LlamaIndex: a retriever and a vector store.

The retriever works over any pipeline; the store owns a table that a pipeline watches. The model of the pipeline
embeds, in the database, so vectors that LlamaIndex made are not used.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import (
    BaseNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from embedline.client.integrations.database import Database, Pool
from embedline.client.integrations.document_table import (
    Document,
    DocumentTable,
    Wait,
    create_document_table,
    document_of,
    open_document_table,
)
from embedline.client.integrations.llamaindex_filters import condition_of, is_one_of
from embedline.client.integrations.search_call import search_call, shown

__all__ = ["EmbedlineRetriever", "EmbedlineVectorStore"]

# LlamaIndex's modes of a query by the modes of `search`; None leaves it to the pipeline.
_MODES = {
    VectorStoreQueryMode.DEFAULT: None,
    VectorStoreQueryMode.HYBRID: "hybrid",
    VectorStoreQueryMode.SEMANTIC_HYBRID: "hybrid",
    VectorStoreQueryMode.SPARSE: "keyword",
    VectorStoreQueryMode.TEXT_SEARCH: "keyword",
}
_REF_DOC_ID = "ref_doc_id"


class EmbedlineRetriever(BaseRetriever):
    """The nearest chunks of a pipeline to a text.

    A node's source is the row of its chunk, by the row's key. `options` are further arguments of `embedline.search`.
    """

    def __init__(self, connection: str | Pool, pipeline: str, *, k: int = 10, **options: Any) -> None:
        """Take a connection string of libpq, or a ConnectionPool of psycopg_pool."""
        super().__init__()
        self._database = Database(connection)
        self._pipeline, self._k, self._options = pipeline, k, options

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._database.rows(
            f"SELECT * FROM {search_call(self._options)}",
            {"pipeline": self._pipeline, "query": query_bundle.query_str, "k": self._k, **self._options},
        )
        return [NodeWithScore(node=self._node(row), score=row["score"]) for row in found]

    def _node(self, row: dict[str, Any]) -> TextNode:
        # The same chunk has the same id in every answer, so that answers can be fused.
        id_ = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self._pipeline}\0{row['key']}\0{row['chunk']}"))
        source = RelatedNodeInfo(node_id=row["key"])
        metadata = {"key": row["key"], **shown(row)}
        return TextNode(
            id_=id_,
            text=row["chunk"],
            metadata=metadata,
            excluded_embed_metadata_keys=list(metadata),
            excluded_llm_metadata_keys=list(metadata),
            relationships={NodeRelationship.SOURCE: source},
        )

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)

    def close(self) -> None:
        """Close the pool if it was made from a connection string."""
        self._database.close()


class EmbedlineVectorStore(BasePydanticVectorStore):
    """A table of nodes that a pipeline watches.

    `wait` says who embeds an added node. "embed" is the call itself, for which the role needs embedline_worker.
    "worker" waits for a resident worker; "none" does not wait.
    """

    stores_text: bool = True
    # A query comes as text: the database embeds it.
    is_embedding_query: bool = False
    name: str
    wait: Wait = "embed"
    wait_seconds: float = 60.0
    _database: Database = PrivateAttr()
    _nodes: DocumentTable = PrivateAttr()

    def __init__(self, connection: str | Pool, name: str, *, wait: Wait = "embed", wait_seconds: float = 60.0) -> None:
        """Open the store of a name that `create` made.

        Raises LookupError if there is none.
        """
        super().__init__(name=name, wait=wait, wait_seconds=wait_seconds)  # type: ignore[call-arg]
        self._database = Database(connection)
        self._nodes = open_document_table(self._database, name, wait, wait_seconds)

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
    def class_name(cls) -> str:
        """Return the name by which LlamaIndex knows the class."""
        return "EmbedlineVectorStore"

    @property
    def client(self) -> Database:
        """Return what runs the statements."""
        return self._database

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Write nodes over those of the same ids, and return the ids.

        Commits, and sees to their vectors. Raises NotEmbedded if there are none in time; the rows stay.
        """
        self._nodes.put([_document(node) for node in nodes])
        return [node.node_id for node in nodes]

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Run `add` in a thread."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete the nodes of a document; no search finds them from then on."""
        self._nodes.delete(condition=is_one_of(_REF_DOC_ID, [ref_doc_id]))

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Run `delete` in a thread."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete the nodes of these ids that the filters accept.

        Without both it deletes none; `clear` deletes all.
        """
        if node_ids is not None or filters is not None:
            self._nodes.delete(node_ids, condition_of(filters))

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Run `delete_nodes` in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters)

    def clear(self) -> None:
        """Delete all nodes."""
        self._nodes.delete()

    async def aclear(self) -> None:
        """Run `clear` in a thread."""
        await asyncio.to_thread(self.clear)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Return nodes, embedded or not."""
        return [_node(found) for found in self._nodes.get(node_ids, condition_of(filters))]

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Run `get_nodes` in a thread."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Return the nodes that are nearest to a query's text.

        Further arguments are those of `embedline.search`; they come before what the query says.
        Raises ValueError for a query without a text, and for a mode that `search` has not.
        """
        if query.query_str is None:
            raise ValueError("the model of the pipeline embeds the query: pass query_str")
        if query.mode not in _MODES:
            raise ValueError(f"query mode {query.mode.value} is none of {', '.join(mode.value for mode in _MODES)}")
        options = {**_mode_of(query), **kwargs}
        top = query.similarity_top_k
        if options.get("mode") == "hybrid":
            top = query.hybrid_top_k or top
        found = self._nodes.nearest(query.query_str, top, _condition(query), options)
        return VectorStoreQueryResult(
            nodes=[_node(document_of(row)) for row in found],
            similarities=[float(row["score"]) for row in found],
            ids=[row["id"] for row in found],
        )

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Run `query` in a thread."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    def close(self) -> None:
        """Close the pool if it was made from a connection string."""
        self._database.close()


def _mode_of(query: VectorStoreQuery) -> dict[str, Any]:
    """Return the mode of a query and its weights.

    An alpha of 1 is the vectors alone, 0 the words alone.
    """
    mode = _MODES[query.mode]
    if mode is None:
        return {}
    if mode != "hybrid" or query.alpha is None:
        return {"mode": mode}
    if not 0 <= query.alpha <= 1:
        raise ValueError(f"alpha is {query.alpha:g}, not between 0 and 1")
    return {"mode": mode, "semantic_weight": query.alpha, "keyword_weight": 1 - query.alpha}


def _condition(query: VectorStoreQuery) -> str | None:
    """Return what a query asks of the rows: filters, ids of nodes, ids of documents."""
    conditions = [found for found in (condition_of(query.filters),) if found is not None]
    # An index over a store with texts passes an empty list, which restricts nothing.
    if query.node_ids:
        conditions.append(is_one_of(None, query.node_ids))
    if query.doc_ids:
        conditions.append(is_one_of(_REF_DOC_ID, query.doc_ids))
    return " AND ".join(conditions) or None


def _document(node: BaseNode) -> Document:
    metadata = node_to_metadata_dict(node, remove_text=True, flat_metadata=False)
    return Document(node.node_id, node.get_content(metadata_mode=MetadataMode.NONE), metadata)


def _node(found: Document) -> BaseNode:
    return metadata_dict_to_node(dict(found.metadata), text=found.content)
