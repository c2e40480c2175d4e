"""The list of addresses at which models may be asked: who edits it, and that it is read before each request."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from conftest import Connect, MakeRole
from stub_fixtures import running_stub, stub
from stub_provider import StubProvider
from support import create_pages, create_pipeline, drain, scalar, searching

__all__ = ["running_stub", "stub"]

_CREATE = "SELECT embedline.create_model('stub', 'openai', 'stub', base_url => %s)"
_OFF_THE_LIST = "DELETE FROM embedline.allowed_endpoint WHERE scheme = 'http' AND host = '127.0.0.1'"


@pytest.mark.parametrize("role", ["embedline_reader", "embedline_worker", "embedline_admin"])
def test_only_a_superuser_edits_the_list(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole, role: str
) -> None:
    with connect(make_role(role)) as session:
        assert scalar(session, "SELECT count(*) FROM embedline.allowed_endpoint") > 0
        for statement in (
            "INSERT INTO embedline.allowed_endpoint (scheme, host) VALUES ('https', 'evil.example')",
            "UPDATE embedline.allowed_endpoint SET host = 'evil.example'",
            "DELETE FROM embedline.allowed_endpoint",
            "TRUNCATE embedline.allowed_endpoint",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                session.execute(statement)


def test_a_model_outside_the_list_is_registered_after_the_statement_of_the_hint(
    database: psycopg.Connection, stub: StubProvider
) -> None:
    database.execute(_OFF_THE_LIST)
    with pytest.raises(psycopg.Error) as refused:
        database.execute(_CREATE, (stub.url,))
    assert refused.value.sqlstate == "EL013"
    assert stub.asked() == []
    hint = str(refused.value.diag.message_hint)
    database.execute(hint.removeprefix("As a superuser: "))
    database.execute(_CREATE, (stub.url,))


def test_an_address_that_is_taken_off_the_list_is_asked_no_more(
    database: psycopg.Connection, stub: StubProvider, connect: Connect, make_role: MakeRole
) -> None:
    database.execute(_CREATE, (stub.url,))
    create_pages(database, 5)
    create_pipeline(database, model="stub")
    assert drain(database) == 5
    assert searching(database, "page", "rivers")
    reader = make_role("embedline_reader")
    database.execute(f"GRANT SELECT ON page TO {reader}")
    stub.forget()
    database.execute(_OFF_THE_LIST)
    database.execute("UPDATE page SET body = 'Other words'")
    assert drain(database) == 0
    with connect(reader) as session, pytest.raises(psycopg.Error, match="may not be asked at"):
        searching(session, "page", "bread")
    assert stub.asked() == []
    # No row is charged for it: all is embedded once the address is back, by the hint's statement.
    status = "SELECT dead_letters, pending, last_error FROM embedline.status"
    dead, pending, last_error = database.execute(status).fetchone() or ()
    assert (dead, pending) == (0, 5)
    assert "may not be asked at" in last_error
    database.execute("INSERT INTO embedline.allowed_endpoint (scheme, host) VALUES ('http', '127.0.0.1')")
    database.execute("SELECT embedline.resume_model('stub')")
    assert drain(database) == 5


def test_an_endpoint_does_not_move_off_the_list(database: psycopg.Connection, stub: StubProvider) -> None:
    database.execute(_CREATE, (stub.url,))
    with pytest.raises(psycopg.Error, match=r"may not be asked at elsewhere\.invalid"):
        database.execute("SELECT embedline.alter_model('stub', base_url => 'https://elsewhere.invalid/v1')")
    assert scalar(database, "SELECT base_url FROM embedline.model WHERE name = 'stub'") == stub.url


def test_a_reranker_is_asked_at_addresses_of_the_list_alone(database: psycopg.Connection, stub: StubProvider) -> None:
    create = "SELECT embedline.create_model('r', 'tei', 'r', base_url => %s, task => 'rerank')"
    database.execute(create, (stub.rerank_urls["tei"],))
    rerank = "SELECT embedline.rerank('r', 'bread', ARRAY['Bread is baked.', 'Rivers flow.'])"
    database.execute(rerank)
    stub.forget()
    database.execute(_OFF_THE_LIST)
    with pytest.raises(psycopg.Error, match="may not be asked at"):
        database.execute(rerank)
    assert "requests" not in stub.counts()
