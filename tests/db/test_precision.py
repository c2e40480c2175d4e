"""Precision indexes: what a version can have, what search may use, and how they go away."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import psycopg
import pytest
from psycopg import errors, sql

from embedline.client import build_index
from generated_names import PAGE
from support import create_pages, create_pipeline, scalar, searching, settle

Connect = Callable[..., psycopg.Connection]
MakeRole = Callable[..., str]


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    create_pages(database, 60)
    create_pipeline(database)
    settle(database)
    return database


def _add(connection: psycopg.Connection, kind: str, *rest: object, version: int = 1) -> str:
    places = ", %s" * len(rest)
    return str(
        scalar(connection, f"SELECT embedline.add_precision_index('page', %s, %s{places})", (version, kind, *rest))
    )


def _build(connection: psycopg.Connection, name: str | None) -> str | None:
    return build_index.build(build_index.PsycopgClient(connection), "page", 1, name)


def _states(connection: psycopg.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT name, state FROM embedline.index_progress('page')").fetchall())


def test_each_kind_has_its_name_and_is_built_beside_the_column_s_own(pages: psycopg.Connection) -> None:
    assert [_add(pages, "halfvec"), _add(pages, "binary"), _add(pages, "prefix", 64), _add(pages, "prefix", 128)] == [
        "halfvec",
        "binary",
        "prefix_64",
        "prefix_128",
    ]
    assert set(_states(pages).values()) == {"missing"}
    for name in ("halfvec", "binary", "prefix_64", "prefix_128"):
        assert f"page_v1_{name}_idx" in str(_build(pages, name))
    assert _states(pages).pop("page_v1_embedding_idx") == "missing"
    assert _build(pages, None) is not None
    assert set(_states(pages).values()) == {"valid"}
    sizes = dict(pages.execute("SELECT name, bytes FROM embedline.index_progress('page')").fetchall())
    assert sizes["page_v1_binary_idx"] < sizes["page_v1_prefix_64_idx"] < sizes["page_v1_embedding_idx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4",), 'kind "int4" is not known'),
        (("prefix",), "a prefix has 1 to 255 of the 256 dimensions"),
        (("prefix", 256), "a prefix has 1 to 255 of the 256 dimensions"),
        (("prefix", 0), "a prefix has 1 to 255 of the 256 dimensions"),
        (("binary", 64), "a binary index has all 256 dimensions"),
        (("binary", None, None), "oversampling must not be NULL"),
        (("binary", None, Decimal("0.5")), "oversampling must be between 1 and 100, not 0.5"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(
    pages: psycopg.Connection, arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(errors.InvalidParameterValue, match=message):
        _add(pages, *arguments)  # type: ignore[arg-type]


def test_halfvec_of_halfvec_and_a_second_of_the_same_are_refused(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database, column_type="halfvec")
    with pytest.raises(errors.InvalidParameterValue, match="halfvec already"):
        _add(database, "halfvec")
    assert _add(database, "binary") == "binary"
    with pytest.raises(errors.DuplicateObject) as caught:
        _add(database, "binary")
    assert "drop_precision_index('page', 1, 'binary')" in str(caught.value.diag.message_hint)


def test_a_prefix_too_long_for_its_type_is_refused(database: psycopg.Connection) -> None:
    create_pages(database, 1)
    create_pipeline(database, index_method="none")
    # As of a model of 3,072 dimensions, which is not to be had in a test.
    database.execute("UPDATE embedline.version SET dimensions = 3072")
    with pytest.raises(errors.InvalidParameterValue, match="2,000 dimensions; 2,500 are too many") as caught:
        _add(database, "prefix", 2500)
    assert "halfvec" in str(caught.value.diag.message_hint)
    assert _add(database, "halfvec") == "halfvec"
    assert _add(database, "prefix", 2000) == "prefix_2000"


def test_search_may_use_only_what_is_built(pages: psycopg.Connection) -> None:
    _add(pages, "binary")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="is not built") as caught:
        pages.execute("SELECT embedline.use_precision('page', 1, 'binary')")
    assert "embedline build-index page --version 1 --precision binary" in str(caught.value.diag.message_hint)
    _build(pages, "binary")
    pages.execute("SELECT embedline.use_precision('page', 1, 'binary')")
    assert scalar(pages, "SELECT search_precision FROM embedline.version") == "binary"
    with pytest.raises(errors.UndefinedObject, match='no precision index "halfvec"'):
        pages.execute("SELECT embedline.use_precision('page', 1, 'halfvec')")


def test_an_index_in_use_is_not_dropped(pages: psycopg.Connection) -> None:
    _add(pages, "binary")
    _build(pages, "binary")
    pages.execute("SELECT embedline.use_precision('page', 1, 'binary')")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="search uses") as caught:
        pages.execute("SELECT embedline.drop_precision_index('page', 1, 'binary')")
    pages.execute(str(caught.value.diag.message_hint))
    pages.execute("SELECT embedline.drop_precision_index('page', 1, 'binary')")
    assert _states(pages) == {"page_v1_embedding_idx": "missing"}
    assert scalar(pages, f"SELECT to_regclass('{PAGE.index(1, 'binary')}')") is None


def test_only_who_owns_the_source_adds_and_drops(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    stranger = connect(make_role("embedline_admin"))
    for statement in (
        "SELECT embedline.add_precision_index('page', 1, 'binary')",
        "SELECT embedline.use_precision('page', 1, NULL)",
        "SELECT embedline.drop_precision_index('page', 1, 'binary')",
        "SELECT embedline.build_vector_index('page', 1)",
    ):
        with pytest.raises(errors.InsufficientPrivilege, match="must be owner"):
            stranger.execute(statement)
    reader = connect(make_role("embedline_reader"))
    assert reader.execute("SELECT name, state FROM embedline.index_progress()").fetchall() == [
        ("page_v1_embedding_idx", "missing")
    ]
    with pytest.raises(errors.InsufficientPrivilege):
        reader.execute("SELECT embedline._index_plan('page', 1, NULL, NULL)")


def test_search_ranks_with_the_index_that_is_used(pages: psycopg.Connection) -> None:
    before = [key for key, _, _ in searching(pages, "page", "the height of mountains", k=5)]
    _add(pages, "prefix", 2, 1)
    _build(pages, "prefix_2")
    pages.execute("SELECT embedline.use_precision('page', 1, 'prefix_2')")
    # Rows that no check has looked at yet are ranked exactly, whatever the index finds.
    pages.execute(
        "INSERT INTO embedline.index_reach (version_id, checked_to) SELECT version_id, 1000 FROM embedline.version"
    )
    # Two dimensions of 256 and few rows to spare: others are found, and ranked by the whole vectors.
    pages.execute("SET enable_seqscan = off; SET enable_sort = on; SET jit = off")
    cut = searching(pages, "page", "the height of mountains", k=5)
    assert [key for key, _, _ in cut] != before
    assert [score for _, _, score in cut] == sorted((score for _, _, score in cut), reverse=True)
    whole = searching(pages, "page", "the height of mountains", k=60)
    assert len(whole) == 60
    assert dict((key, score) for key, _, score in whole).items() >= {(key, score) for key, _, score in cut}
    assert len(searching(pages, "page", "the height of mountains", k=5, per_document=True)) == 5
    pages.execute("SELECT embedline.use_precision('page', 1, NULL)")
    assert [key for key, _, _ in searching(pages, "page", "the height of mountains", k=5)] == before


def test_a_reader_searches_with_it_and_needs_no_further_right(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    _add(pages, "halfvec")
    _build(pages, "halfvec")
    pages.execute("SELECT embedline.use_precision('page', 1, 'halfvec')")
    role = make_role("embedline_reader")
    pages.execute(sql.SQL("GRANT SELECT ON page TO {}").format(sql.Identifier(role)))
    assert len(searching(connect(role), "page", "rivers", k=5)) == 5
