"""Chunkers, document prefixes and tenants in the database."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from embedline.chunking import METHODS
from generated_names import PAGE
from support import (
    assert_exact,
    create_pages,
    create_pipeline,
    data_count,
    drain,
    embed_static,
    queued,
    scalar,
    searching,
    settle,
)

_BODY = """Rivers flow to the sea. They carry sand and stones for hundreds of miles.
A river may freeze in a cold winter.

# Rockets

Rockets fly to the moon. They burn hydrogen and oxygen, which is heavy.

## Engines

A rocket engine has no moving parts but its pumps. 漢字も。 It is cooled by its own fuel 👩‍👩‍👧.
"""


@pytest.fixture
def source(database: psycopg.Connection) -> psycopg.Connection:
    """Table page with 12 rows of several chunks each, and no pipeline."""
    create_pages(database, 12)
    database.execute("UPDATE page SET body = body || E'.\\n\\n' || %s", (_BODY,))
    return database


def _read(connection: psycopg.Connection, key: int = 1) -> tuple[Any, ...]:
    row = connection.execute(
        f"SELECT content, content_hash, prefix FROM {PAGE('read')}(ARRAY[%s], 1000000)", (key,)
    ).fetchone()
    assert row is not None
    return row


def _locked_hash(connection: psycopg.Connection, key: int = 1) -> bytes:
    return bytes(scalar(connection, f"SELECT content_hash FROM {PAGE('look')}(ARRAY[%s])", (key,)))


# --- chunkers


@pytest.mark.parametrize("overlap", [0, 8])
@pytest.mark.parametrize("method", METHODS)
def test_every_chunker_stores_its_chunks_and_follows_edits(
    source: psycopg.Connection, method: str, overlap: int
) -> None:
    create_pipeline(source, chunking=method, chunk_tokens=24, chunk_overlap=overlap)
    settle(source)
    stored = assert_exact(source)
    assert stored == 12 if method == "none" else stored > 24
    source.execute("UPDATE page SET body = replace(body, 'moon', 'nearest planet') WHERE id <= 3")
    assert drain(source) == 3
    assert_exact(source)


def test_semantic_takes_a_percentile(source: psycopg.Connection) -> None:
    create_pipeline(source, chunking="semantic", chunk_tokens=80, chunking_options='{"percentile": 95}')
    create_pipeline(source, name="fine", chunking="semantic", chunk_tokens=80, chunking_options='{"percentile": 20}')
    settle(source)
    assert assert_exact(source) < assert_exact(source, "fine")


def test_markdown_headings_are_embedded_with_each_chunk(source: psycopg.Connection) -> None:
    create_pipeline(source, content="body", chunking="markdown", chunk_tokens=32, document_prefix="title || E'\\n'")
    settle(source)
    assert_exact(source)
    prefixes = {row[0] for row in source.execute(f"SELECT prefix FROM {PAGE('chunk')} WHERE key_id = 3")}
    assert {"Title 3\n", "Title 3\nRockets > Engines\n\n"} <= prefixes


# --- document prefix


@pytest.mark.parametrize("method", METHODS)
def test_the_prefix_is_embedded_and_not_shown(source: psycopg.Connection, method: str) -> None:
    create_pipeline(source, content="body", document_prefix="title || E'\\n'", chunking=method, chunk_tokens=32)
    settle(source)
    assert_exact(source)
    assert scalar(source, f"SELECT bool_and(prefix LIKE E'Title %\\n%') FROM {PAGE('chunk')}")
    assert scalar(source, "SELECT count(*) FROM page_embedding WHERE chunk LIKE '%Title%'") == 0


def test_a_change_of_the_prefix_alone_embeds_the_row_again(source: psycopg.Connection) -> None:
    create_pipeline(source, content="body", document_prefix="upper(title)")
    settle(source)
    source.execute("UPDATE page SET title = lower(title), views = 7")
    assert queued(source) == 0
    source.execute("UPDATE page SET title = 'Another' WHERE id <= 4")
    assert queued(source) == 4
    assert drain(source) == 4
    assert_exact(source)


def test_a_row_without_a_prefix_has_its_content_alone(source: psycopg.Connection) -> None:
    source.execute("UPDATE page SET title = NULL WHERE id <= 5")
    source.execute("UPDATE page SET title = '' WHERE id = 6")
    create_pipeline(source, content="body", document_prefix="title", chunk_tokens=32)
    settle(source)
    assert_exact(source)
    without = f"SELECT array_agg(DISTINCT key_id ORDER BY key_id) FROM {PAGE('chunk')} WHERE prefix IS NULL"
    assert scalar(source, without) == [1, 2, 3, 4, 5, 6]


def test_a_prefix_moves_the_vector(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    database.execute("UPDATE page SET body = 'The same body.', title = 'Violins' WHERE id = 1")
    database.execute("UPDATE page SET body = 'The same body.', title = 'Rockets' WHERE id = 2")
    create_pipeline(database, content="body", document_prefix="title || ': '")
    settle(database)
    assert_exact(database)
    assert searching(database, "page", "violins", k=1)[0][:2] == ("1", "The same body.")
    assert searching(database, "page", "rockets", k=1)[0][:2] == ("2", "The same body.")


def test_a_prefix_that_raises_makes_a_dead_letter_and_no_more(source: psycopg.Connection) -> None:
    create_pipeline(source, content="body", document_prefix="(10 / views)::text", filter="id < 100")
    source.execute("UPDATE page SET views = 5 WHERE id > 1")
    settle(source)
    assert scalar(source, "SELECT count(*) FROM embedline.dead_letter WHERE stage = 'read'") == 1
    source.execute("UPDATE page SET views = 1 WHERE id = 1")
    settle(source)
    assert_exact(source)


def test_the_prefix_of_a_rejected_row_is_never_evaluated(source: psycopg.Connection) -> None:
    source.execute("UPDATE page SET views = 5 WHERE id > 1")
    create_pipeline(source, content="body", document_prefix="(10 / views)::text", filter="views <> 0")
    settle(source)
    assert data_count(source, "document") == 11
    assert scalar(source, "SELECT count(*) FROM embedline.dead_letter") == 0


def test_the_hash_without_a_prefix_is_the_contents(source: psycopg.Connection) -> None:
    create_pipeline(source, content="body")
    content, content_hash, prefix = _read(source)
    assert (content_hash, prefix) == (hashlib.sha256(content.encode()).digest(), None)
    assert _locked_hash(source) == content_hash


def test_the_hash_with_a_prefix_tells_where_one_ends(database: psycopg.Connection) -> None:
    create_pages(database, 4)
    create_pipeline(database, content="body", document_prefix="title")
    pairs = [("ab", "c"), ("a", "bc"), ("", "abc"), (None, "abc")]
    hashes = []
    for key, (title, body) in enumerate(pairs, start=1):
        database.execute("UPDATE page SET title = %s, body = %s WHERE id = %s", (title, body, key))
        content, content_hash, prefix = _read(database, key)
        assert (content, prefix) == (body, title)
        assert _locked_hash(database, key) == content_hash
        hashes.append(content_hash)
    assert len(set(hashes)) == 3  # no prefix and an empty one are embedded alike
    database.execute("UPDATE page SET body = NULL WHERE id = 1")
    assert _read(database)[:2] == (None, None)


def test_renamed_columns_of_prefix_and_tenant_are_followed(source: psycopg.Connection) -> None:
    create_pipeline(source, content="body", document_prefix="title", tenant="views")
    settle(source)
    source.execute("ALTER TABLE page RENAME COLUMN title TO headline")
    source.execute("ALTER TABLE page RENAME COLUMN views TO visits")
    source.execute("UPDATE page SET headline = 'Changed', visits = 9 WHERE id = 2")
    assert queued(source) == 1
    assert _read(source, 2)[2] == "Changed"
    assert _tenants(source, [2]) == [(1, "9")]
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        source.execute("ALTER TABLE page DROP COLUMN visits")


# --- tenants and weight


def _tenants(connection: psycopg.Connection, keys: list[int]) -> list[tuple[int, str | None]]:
    query = f"SELECT ordinality, tenant FROM {PAGE('tenant')}(%s::integer[]) ORDER BY ordinality"
    return connection.execute(query, (keys,)).fetchall()


def test_the_tenant_of_keys_is_told_in_their_order(source: psycopg.Connection) -> None:
    source.execute("UPDATE page SET views = id % 3")
    create_pipeline(source, tenant="'customer ' || views")
    assert _tenants(source, [4, 3, 99, 2]) == [(1, "customer 1"), (2, "customer 0"), (4, "customer 2")]


def test_a_tenant_that_raises_is_nobody(source: psycopg.Connection) -> None:
    source.execute("UPDATE page SET views = 2 WHERE id <> 1")
    create_pipeline(source, tenant="10 / views")
    assert _tenants(source, [1, 2]) == [(1, None), (2, "5")]


def test_a_change_of_tenant_is_no_change_of_content(source: psycopg.Connection) -> None:
    create_pipeline(source, tenant="views")
    settle(source)
    source.execute("UPDATE page SET views = 3")
    assert queued(source) == 0


def test_only_a_pipeline_with_tenants_has_their_index(source: psycopg.Connection) -> None:
    create_pipeline(source, tenant="views")
    create_pipeline(source, name="other")
    found = {row[0] for row in source.execute("SELECT indexname FROM pg_indexes WHERE schemaname = 'embedline_data'")}
    assert "page_outbox_tenant_idx" in found
    assert "other_outbox_tenant_idx" not in found


def test_the_tenant_is_evaluated_as_the_sources_owner(
    database: psycopg.Connection, make_role: Callable[..., str], connect: Callable[..., psycopg.Connection]
) -> None:
    owner = make_role("embedline_admin")
    create_pages(database, 3)
    database.execute(f'ALTER TABLE page OWNER TO "{owner}"; GRANT CREATE ON SCHEMA public TO "{owner}"')
    connect(owner).execute(
        "CREATE FUNCTION who(integer) RETURNS text LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN current_user; END $$"
    )
    create_pipeline(connect(owner), tenant="who(views)")
    assert _tenants(database, [1]) == [(1, owner)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        _tenants(connect(make_role("embedline_worker")), [1])
    database.execute(f'REVOKE CREATE ON SCHEMA public FROM "{owner}"')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"document_prefix": "nothing_of_that_name"}, "document_prefix"),
        ({"document_prefix": "max(title)"}, "aggregate"),
        ({"document_prefix": "random()::text"}, "volatile"),
        ({"tenant": "(SELECT 1)"}, "subquery"),
        ({"tenant": "views; SELECT 1"}, "semicolon"),
        ({"weight": 0}, "weight"),
        ({"weight": "NaN"}, "weight"),
        ({"weight": "Infinity"}, "weight"),
        ({"weight": None}, "weight"),
        ({"chunking_options": '{"percentile": 90}'}, "percentile"),
        ({"chunking": "semantic", "chunking_options": '{"percentile": 0}'}, "percentile"),
    ],
)
def test_a_wrong_value_is_refused_with_a_hint(source: psycopg.Connection, change: dict[str, Any], words: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=words) as caught:
        create_pipeline(source, **change)
    assert caught.value.diag.message_hint


def test_a_constant_can_be_the_prefix(source: psycopg.Connection) -> None:
    create_pipeline(source, content="body", document_prefix="'Page: '", chunk_tokens=32)
    settle(source)
    assert_exact(source, embed=embed_static)
