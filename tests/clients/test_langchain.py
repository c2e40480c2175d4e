"""LangChain's own suites over the vector store and the retriever, unmodified, and what they do not ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from langchain_core.documents import Document
from langchain_core.load import dumpd
from langchain_tests.integration_tests import RetrieversIntegrationTests, VectorStoreIntegrationTests
from psycopg import conninfo

from conftest import MakeRole
from embedline.client.integrations.document_table import NotEmbedded
from embedline.client.integrations.langchain import EmbedlineRetriever, EmbedlineVectorStore
from support import create_pages, create_pipeline, drain, scalar, wait_until


@pytest.fixture(scope="module")
def module_store(module_database: psycopg.Connection) -> Iterator[EmbedlineVectorStore]:
    """One store for all tests of the module."""
    store = EmbedlineVectorStore.create(_dsn(module_database), "notes", "static-256")
    yield store
    store.close()


@pytest.fixture
def store(module_store: EmbedlineVectorStore) -> Iterator[EmbedlineVectorStore]:
    """The store, empty."""
    yield module_store
    module_store.delete()


@pytest.fixture(scope="module")
def pages(module_database: psycopg.Connection) -> psycopg.Connection:
    """A database with a pipeline over twenty pages, embedded."""
    create_pages(module_database, 20)
    create_pipeline(module_database)
    drain(module_database)
    return module_database


@pytest.fixture
def retriever_of_pages(pages: psycopg.Connection) -> Iterator[EmbedlineRetriever]:
    """A retriever over the pages."""
    retriever = EmbedlineRetriever(connection=_dsn(pages), pipeline="page")
    yield retriever
    retriever.close()


def _dsn(connection: psycopg.Connection) -> str:
    return f"{connection.info.dsn} password={connection.info.password}"


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, store: EmbedlineVectorStore) -> EmbedlineVectorStore:  # type: ignore[override]
        return store


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _pages(self, pages: psycopg.Connection) -> None:
        self._dsn = _dsn(pages)

    @property
    def retriever_constructor(self) -> type[EmbedlineRetriever]:
        return EmbedlineRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"connection": self._dsn, "pipeline": "page"}

    @property
    def retriever_query_example(self) -> str:
        return "mountains and rivers"


def test_documents_are_ranked_by_meaning_with_their_scores(store: EmbedlineVectorStore) -> None:
    store.add_texts(
        ["Knead the dough and bake the bread.", "The rocket reached its orbit."], [{"n": 1}, {"n": 2}], ids=["a", "b"]
    )
    (first, best), (second, worse) = store.similarity_search_with_score("how do I bake a loaf?", k=2)
    assert (first.id, second.id) == ("a", "b")
    assert -1 <= worse < best <= 1
    assert first == Document(page_content="Knead the dough and bake the bread.", metadata={"n": 1}, id="a")


@pytest.mark.parametrize("value", ["en", "100 % d'accord \\ (SELECT 1)", {"deep": [1, None]}])
def test_a_filter_is_compared_with_the_metadata_and_never_run(store: EmbedlineVectorStore, value: object) -> None:
    store.add_texts(
        ["bread one", "bread two", "bread three"], [{}, {"lang": value}, {"lang": "de"}], ids=["1", "2", "3"]
    )
    found = store.similarity_search("bread", k=3, filter={"lang": value})
    assert [(document.id, document.metadata) for document in found] == [("2", {"lang": value})]


def test_a_filtered_search_finds_k_documents_beside_one_of_many_chunks(store: EmbedlineVectorStore) -> None:
    long = " ".join(f"Sentence {number} about bread and dough and flour." for number in range(200))
    store.add_texts([long, "Violins.", "Rockets."], [{"kept": True}] * 3, ids=["long", "1", "2"])
    found = store.similarity_search("bread", k=3, filter={"kept": True})
    assert [found[0].id, *sorted(document.id or "" for document in found[1:])] == ["long", "1", "2"]


def test_documents_that_are_unlike_each_other_are_preferred_by_mmr(store: EmbedlineVectorStore) -> None:
    store.add_texts(
        ["Bake the bread in the oven.", "Bake the bread in the hot oven.", "Bread is made of flour and water."],
        [{"kept": True}] * 3,
        ids=["oven", "hot oven", "flour"],
    )
    retriever = store.as_retriever(search_type="mmr", search_kwargs={"k": 2, "lambda_mult": 0.1})
    assert {found.id for found in retriever.invoke("bake bread in the oven")} > {"flour"}
    assert store.max_marginal_relevance_search("bread", filter={"kept": False}) == []


def test_an_id_written_twice_in_one_call_keeps_the_last_text(store: EmbedlineVectorStore) -> None:
    assert store.add_texts(["first", "second"], ids=["1", "1"]) == ["1", "1"]
    assert [found.page_content for found in store.get_by_ids(["1"])] == ["second"]


def test_a_store_that_does_not_wait_leaves_the_work_to_others(
    store: EmbedlineVectorStore, module_database: psycopg.Connection
) -> None:
    drain(module_database)
    with_others = EmbedlineVectorStore(_dsn(module_database), "notes", wait="none")
    waiting = EmbedlineVectorStore(_dsn(module_database), "notes", wait="worker", wait_seconds=0.01)
    try:
        with_others.add_texts(["bread"], ids=["1"])
        assert store.similarity_search("bread") == []
        with pytest.raises(NotEmbedded, match='pipeline "notes" still has 2 changes to embed'):
            waiting.add_texts(["dough"], ids=["2"])
        assert [found.id for found in waiting.get_by_ids(["1", "2"])] == ["1", "2"]
        assert drain(module_database) == 2
        assert {found.id for found in store.similarity_search("bread")} == {"1", "2"}
    finally:
        with_others.close()
        waiting.close()


def test_a_store_waits_for_its_own_documents_alone(
    store: EmbedlineVectorStore, module_database: psycopg.Connection
) -> None:
    drain(module_database)
    waiting = EmbedlineVectorStore(_dsn(module_database), "notes", wait="worker", wait_seconds=30)
    try:
        with ThreadPoolExecutor(1) as pool:
            added = pool.submit(waiting.add_texts, ["bread"], ids=["own"])
            wait_until(lambda: scalar(module_database, "SELECT pending FROM embedline.status WHERE pipeline = 'notes'"))
            module_database.execute("INSERT INTO notes (id, content) VALUES ('other', 'dough')")
            assert scalar(module_database, "SELECT embedline.embed_pending(1, 'notes')") == 1
            assert added.result(30) == ["own"]
        assert scalar(module_database, "SELECT pending FROM embedline.status WHERE pipeline = 'notes'") == 1
    finally:
        waiting.close()


def test_each_role_needs_the_rights_that_the_page_names(
    database: psycopg.Connection, database_dsn: str, make_role: MakeRole, role_passwords: dict[str, str]
) -> None:
    EmbedlineVectorStore.create(database_dsn, "notes", "static-256").close()
    for wait, memberships in (("none", ["embedline_reader"]), ("embed", ["embedline_reader", "embedline_worker"])):
        role = make_role(*memberships)
        database.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON notes TO {role}".encode())
        dsn = conninfo.make_conninfo(database_dsn, user=role, password=role_passwords[role])
        store = EmbedlineVectorStore(dsn, "notes", wait=wait)
        try:
            store.add_texts(["bread"], ids=["1"])
            drain(database)
            assert [found.id for found in store.similarity_search("bread")] == ["1"]
            store.delete(["1"])
        finally:
            store.close()


def test_a_store_opens_its_own_kind_of_table_alone(pages: psycopg.Connection) -> None:
    with pytest.raises(LookupError, match='there is no pipeline "nothing"'):
        EmbedlineVectorStore(_dsn(pages), "nothing")
    with pytest.raises(ValueError, match='the source of pipeline "page" has no columns id, content, metadata'):
        EmbedlineVectorStore(_dsn(pages), "page")


def test_a_document_that_cannot_be_embedded_is_told(store: EmbedlineVectorStore) -> None:
    with pytest.raises(NotEmbedded, match="1 documents have no vectors, among them bad"):
        store.add_texts(["good", "\u200b\u200b"], ids=["good", "bad"])
    assert [found.id for found in store.similarity_search("good")] == ["good"]


def test_a_store_from_documents_takes_no_embeddings_of_langchain(module_database: psycopg.Connection) -> None:
    documents = [Document("Knead the dough.", metadata={"lang": "en"}), Document("Den Teig kneten.", metadata={})]
    arguments = {"connection": _dsn(module_database), "name": "recipe", "model": "static-256"}
    with pytest.raises(ValueError, match="the model of the pipeline embeds"):
        EmbedlineVectorStore.from_documents(documents, VectorStoreIntegrationTests.get_embeddings(), **arguments)
    store = EmbedlineVectorStore.from_documents(documents, None, chunk_tokens=64, **arguments)
    try:
        again = store.as_retriever(search_kwargs={"k": 1, "filter": {"lang": "en"}}).invoke("dough")
        assert [found.page_content for found in again] == ["Knead the dough."]
    finally:
        store.close()


def test_a_retriever_returns_chunks_with_their_keys_and_passes_options_on(
    retriever_of_pages: EmbedlineRetriever,
) -> None:
    found = retriever_of_pages.invoke("violins", k=2, per_document=True)
    assert [document.page_content.split()[-1] for document in found] == ["violins", "violins"]
    assert all(set(document.metadata) >= {"score"} and document.id for document in found)
    with pytest.raises(TypeError, match=r"embedline\.search has no argument drop"):
        retriever_of_pages.invoke("violins", drop=True)


def test_a_retriever_searches_by_words_and_by_meaning(module_database: psycopg.Connection) -> None:
    create_pages(module_database, 20, table="worded")
    module_database.execute(
        "SELECT embedline.create_pipeline('worded', 'worded', 'title || body', 'static-256', keyword => 'english')"
    )
    drain(module_database)
    retriever = EmbedlineRetriever(connection=_dsn(module_database), pipeline="worded", mode="keyword", k=2)
    try:
        (found,) = retriever.invoke("number 17", filter="id > 7", k=1)
        assert (found.id, found.metadata["keyword_rank"], "semantic_rank" in found.metadata) == ("17", 1, False)
        (both, *_) = retriever.invoke("number 17", mode="hybrid", semantic_weight=0, rrf_k=1)
        assert (both.id, both.metadata["keyword_rank"], both.metadata["score"]) == ("17", 1, 0.5)
        assert "semantic_rank" in both.metadata
    finally:
        retriever.close()


def test_a_store_with_keywords_finds_words_among_what_the_filter_accepts(module_database: psycopg.Connection) -> None:
    store = EmbedlineVectorStore.create(_dsn(module_database), "worded_notes", "static-256", keyword="english")
    try:
        store.add_texts(
            ["Error EX4711 stops the pump.", "The pump was repaired.", "Error EX4711 again."],
            [{"lang": "en"}, {"lang": "en"}, {"lang": "it's %s"}],
            ids=["1", "2", "3"],
        )
        assert [found.id for found in store.similarity_search("EX4711", mode="keyword", filter={"lang": "en"})] == ["1"]
        for mode in ("keyword", "hybrid"):
            found = store.similarity_search("EX4711", mode=mode, filter={"lang": "it's %s"}, keyword_weight=2)
            assert [document.id for document in found] == ["3"]
    finally:
        store.close()


def test_a_trace_shows_no_password(retriever_of_pages: EmbedlineRetriever) -> None:
    password = conninfo.conninfo_to_dict(retriever_of_pages.connection)["password"]
    assert str(password) not in repr(retriever_of_pages)
    assert str(password) not in json.dumps(dumpd(retriever_of_pages))
