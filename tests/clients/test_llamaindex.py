"""LlamaIndex's retriever and vector store over a pipeline; its own filters, in memory, say what ours must accept.

llama-index-core holds no suite for vector stores in its package, so its documented behaviours are tested here.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from embedline.client.integrations.llamaindex import EmbedlineRetriever, EmbedlineVectorStore
from embedline.errors import InvalidParameter
from support import create_pages, create_pipeline, drain

_METADATA = {
    "1": {"lang": "en", "year": 2020, "tags": ["a", "b"], "note": None, "it's %s": "it's %s"},
    "2": {"lang": "de", "year": 2021.5, "tags": [], "note": ""},
    "3": {"lang": "EN", "year": 2022, "tags": ["b", "c"], "note": []},
    "4": {"lang": "Ångström", "year": "2020", "tags": [1, 2]},
    "5": {},
}
_FOR_LISTS = (FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL)
_FOR_NUMBERS = (FilterOperator.GT, FilterOperator.GTE, FilterOperator.LT, FilterOperator.LTE)
_VALUES = ["en", "e", "b", "", 2020, 2021.5, 1, ["en", "de"], ["a", "b"], ["b"], [1], [2020], [], "2020", "it's %s"]


@pytest.fixture(scope="module")
def module_store(module_database: psycopg.Connection) -> Iterator[EmbedlineVectorStore]:
    """One store for all tests of the module."""
    store = EmbedlineVectorStore.create(_dsn(module_database), "nodes", "static-256")
    yield store
    store.close()


@pytest.fixture
def store(module_store: EmbedlineVectorStore) -> Iterator[EmbedlineVectorStore]:
    """The store, empty."""
    yield module_store
    module_store.clear()


def _dsn(connection: psycopg.Connection) -> str:
    return f"{connection.info.dsn} password={connection.info.password}"


def _node(id_: str, text: str, document: str = "doc", **metadata: object) -> TextNode:
    return TextNode(
        id_=id_,
        text=text,
        metadata=metadata,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)},
    )


def _ids(store: EmbedlineVectorStore, text: str, **asked: object) -> list[str]:
    found = store.query(VectorStoreQuery(query_str=text, **asked))  # type: ignore[arg-type]
    return list(found.ids or [])


def test_added_nodes_are_found_as_they_were(store: EmbedlineVectorStore) -> None:
    bread, rocket = _node("a", "Knead the dough and bake the bread.", n=1), _node("b", "The rocket reached its orbit.")
    assert store.add([bread, rocket]) == ["a", "b"]
    found = store.query(VectorStoreQuery(query_str="how do I bake a loaf?", similarity_top_k=2))
    assert found.ids == ["a", "b"]
    assert found.nodes == [bread, rocket]
    best, worse = found.similarities or []
    assert -1 <= worse < best <= 1
    store.add([_node("a", "The rocket was late.")])
    assert _ids(store, "rocket", similarity_top_k=9)[:2] != []
    assert [node.get_content() for node in store.get_nodes(["a"])] == ["The rocket was late."]


async def test_the_coroutines_do_the_same(store: EmbedlineVectorStore) -> None:
    await store.async_add([_node("a", "bread", n=1), _node("b", "bread", "other")])
    found = await store.aquery(VectorStoreQuery(query_str="bread", similarity_top_k=5))
    assert sorted(found.ids or []) == ["a", "b"]
    await store.adelete("other")
    assert [node.node_id for node in await store.aget_nodes()] == ["a"]
    await store.adelete_nodes(["a"])
    assert await store.aget_nodes() == []


def test_nodes_are_deleted_by_document_by_id_and_by_filter(store: EmbedlineVectorStore) -> None:
    store.add([_node(str(n), f"bread {n}", f"doc {n % 2}", n=n) for n in range(6)])
    store.delete("doc 1")
    assert sorted(_ids(store, "bread", similarity_top_k=9)) == ["0", "2", "4"]
    two = MetadataFilters(filters=[MetadataFilter(key="n", value=2)])
    store.delete_nodes(["0", "2"], two)
    assert sorted(_ids(store, "bread", similarity_top_k=9)) == ["0", "4"]
    store.delete_nodes()
    assert len(store.get_nodes()) == 2
    store.delete_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="n", value=0)]))
    assert [node.node_id for node in store.get_nodes()] == ["4"]


def test_a_query_is_restricted_to_nodes_and_to_documents(store: EmbedlineVectorStore) -> None:
    store.add([_node(str(n), f"bread {n}", f"doc {n}") for n in range(4)])
    assert sorted(_ids(store, "bread", similarity_top_k=9, node_ids=["1", "2"])) == ["1", "2"]
    assert _ids(store, "bread", similarity_top_k=9, node_ids=["1", "2"], doc_ids=["doc 2"]) == ["2"]
    assert _ids(store, "bread", similarity_top_k=9, doc_ids=["doc 9"]) == []


def test_every_filter_accepts_what_llamaindex_accepts_in_memory(store: EmbedlineVectorStore) -> None:
    store.add([_node(id_, "bread", **metadata) for id_, metadata in _METADATA.items()])
    compared = 0
    for operator in FilterOperator:
        for key in ("lang", "year", "tags", "note", "it's %s"):
            for value in _VALUES:
                filters = MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])
                accepts = build_metadata_filter_fn(_METADATA.__getitem__, filters)
                try:
                    wanted = [id_ for id_ in _METADATA if accepts(id_)]
                except TypeError:  # a comparison of a text with a number
                    continue
                if operator in (
                    _FOR_LISTS if isinstance(value, str) else _FOR_NUMBERS if isinstance(value, list) else ()
                ):
                    continue  # values for which the operators are not documented
                found = sorted(node.node_id for node in store.get_nodes(filters=filters))
                assert found == wanted, (operator, key, value)
                compared += 1
    assert compared > 300


@pytest.mark.parametrize("condition", list(FilterCondition))
def test_filters_are_joined_as_llamaindex_joins_them(store: EmbedlineVectorStore, condition: FilterCondition) -> None:
    store.add([_node(id_, "bread", **metadata) for id_, metadata in _METADATA.items()])
    both = [
        MetadataFilter(key="lang", value="en"),
        MetadataFilter(key="tags", value="b", operator=FilterOperator.CONTAINS),
    ]
    filters = MetadataFilters(filters=both, condition=condition)
    accepts = build_metadata_filter_fn(_METADATA.__getitem__, filters)
    wanted = [id_ for id_ in _METADATA if accepts(id_)]
    assert sorted(_ids(store, "bread", similarity_top_k=9, filters=filters)) == wanted
    nested = MetadataFilters(filters=[filters, MetadataFilters(filters=[MetadataFilter(key="year", value=2020)])])
    assert sorted(_ids(store, "bread", similarity_top_k=9, filters=nested)) == [id_ for id_ in wanted if id_ == "1"]


def test_an_index_of_llamaindex_works_over_the_store(store: EmbedlineVectorStore) -> None:
    # Its vectors are not used, so any embedding will do.
    context = StorageContext.from_defaults(vector_store=store)
    nodes = [_node("a", "Knead the dough and bake the bread."), _node("b", "The rocket reached its orbit.", "late")]
    index = VectorStoreIndex(nodes, storage_context=context, embed_model=MockEmbedding(1))
    assert [found.node_id for found in index.as_retriever(similarity_top_k=1).retrieve("a loaf of bread")] == ["a"]
    index.delete_ref_doc("late")
    assert [found.node_id for found in index.as_retriever(similarity_top_k=5).retrieve("rocket")] == ["a"]


def test_a_query_that_the_database_cannot_answer_is_refused(store: EmbedlineVectorStore) -> None:
    with pytest.raises(ValueError, match="pass query_str"):
        store.query(VectorStoreQuery(query_embedding=[1.0]))
    with pytest.raises(ValueError, match="query mode mmr is none of default, hybrid"):
        store.query(VectorStoreQuery(query_str="bread", mode=VectorStoreQueryMode.MMR))
    with pytest.raises(TypeError, match="filter operator in takes a list"):
        store.get_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="n", value=1, operator=FilterOperator.IN)]))


def test_hybrid_queries_weigh_words_and_meaning_by_alpha(module_database: psycopg.Connection) -> None:
    store = EmbedlineVectorStore.create(_dsn(module_database), "worded", "static-256", keyword="english")
    try:
        store.add([_node("code", "EX4711", lang="en"), _node("bread", "Bake the bread.", lang="en")])
        store.add([_node("other", "EX4711 and bread", lang="de")])
        english = MetadataFilters(filters=[MetadataFilter(key="lang", value="en")])
        # The words are of one node, the meaning is nearer to the other.
        text = "EX4711 flour, yeast, dough and a loaf in the oven"
        for alpha, first in ((1.0, "bread"), (0.0, "code")):
            asked = {"mode": VectorStoreQueryMode.HYBRID, "filters": english, "alpha": alpha, "similarity_top_k": 9}
            assert _ids(store, text, **asked) == sorted(["bread", "code"], key=lambda id_: id_ != first)
        assert _ids(store, text, mode=VectorStoreQueryMode.HYBRID, filters=english, hybrid_top_k=1, alpha=0.1) == [
            "code"
        ]
        assert _ids(store, text, mode=VectorStoreQueryMode.TEXT_SEARCH, filters=english) == ["code"]
        found = store.query(
            VectorStoreQuery(query_str=text, filters=english, similarity_top_k=9), mode="keyword", filter="id <> 'code'"
        )
        assert found.ids == []
        with pytest.raises(InvalidParameter, match="filter is not a single SQL expression"):
            store.query(VectorStoreQuery(query_str=text, filters=english), filter="true) OR (true")
        with pytest.raises(ValueError, match="alpha is 2, not between 0 and 1"):
            store.query(VectorStoreQuery(query_str=text, mode=VectorStoreQueryMode.HYBRID, alpha=2))
    finally:
        store.close()


async def test_a_retriever_over_any_pipeline(module_database: psycopg.Connection) -> None:
    create_pages(module_database, 20)
    create_pipeline(module_database)
    drain(module_database)
    retriever = EmbedlineRetriever(_dsn(module_database), "page", k=2, per_document=True)
    try:
        found = retriever.retrieve("violins")
        assert [node.node.get_content().split()[-1] for node in found] == ["violins", "violins"]
        assert [node.node.ref_doc_id for node in found] == [node.metadata["key"] for node in found]
        again = await retriever.aretrieve("violins")
        assert [node.node_id for node in again] == [node.node_id for node in found]
    finally:
        retriever.close()
