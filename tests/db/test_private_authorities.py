"""create_model and search with a provider whose certificate a private authority vouches for."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from certificates import Authority, make_authority
from conftest import Connect, MakeRole
from support import create_pipeline, scalar, searching, settle


@pytest.fixture(scope="module")
def authority() -> Iterator[Authority]:
    with tempfile.TemporaryDirectory(prefix="embedline-") as folder:
        yield make_authority(Path(folder))


@pytest.fixture(scope="module")
def https(authority: Authority) -> Iterator[HTTPServer]:
    def answer(request: Request) -> Response:
        data = [{"index": i, "embedding": [1.0, len(text)]} for i, text in enumerate(request.get_json()["input"])]
        return Response(json.dumps({"data": data}), content_type="application/json")

    with HTTPServer(threaded=True, ssl_context=authority.server_context()) as server:
        server.expect_request("/v1/embeddings").respond_with_handler(answer)
        yield server


def create_model(connection: psycopg.Connection, server: HTTPServer, ca_file: object) -> None:
    connection.execute(
        "SELECT embedline.create_model('private', 'openai', 'm', base_url => %s, options => %s::jsonb)",
        (server.url_for("/v1"), json.dumps({} if ca_file is None else {"ca_file": ca_file})),
    )


def test_rows_and_queries_are_embedded_behind_a_private_authority(
    database: psycopg.Connection, connect: Connect, https: HTTPServer, authority: Authority
) -> None:
    create_model(database, https, str(authority.certificate))
    database.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    database.execute("INSERT INTO page VALUES (1, 'one'), (2, 'three')")
    create_pipeline(database, "page", "page", "body", "private", index_method="none")
    settle(database)
    assert [key for key, _, _ in searching(connect(), "page", "seven")] == ["2", "1"]


def test_without_the_option_the_way_out_is_told(database: psycopg.Connection, https: HTTPServer) -> None:
    with pytest.raises(psycopg.Error, match="is not trusted") as caught:
        create_model(database, https, None)
    assert caught.value.sqlstate == "EL013"
    assert "ca_file" in str(caught.value.diag.message_hint)


@pytest.mark.parametrize("ca_file", ["ca.pem", 3, ""])
def test_what_is_no_path_is_refused(database: psycopg.Connection, https: HTTPServer, ca_file: object) -> None:
    with pytest.raises(psycopg.Error, match=r"\"ca_file\" of model .* must be the absolute path") as caught:
        create_model(database, https, ca_file)
    assert caught.value.sqlstate == "22023"


def test_a_file_is_named_that_the_server_cannot_use(database: psycopg.Connection, https: HTTPServer) -> None:
    hidden = scalar(database, "SHOW data_directory") + "/PG_VERSION"
    for file, words in ((hidden, "holds no certificate"), ("/nonexistent/ca.pem", "cannot be read")):
        with pytest.raises(psycopg.Error, match=words) as caught:
            create_model(database, https, file)
        assert caught.value.sqlstate == "EL013"
        assert str(caught.value.diag.message_detail).startswith(file)


def test_only_a_superuser_names_a_file(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole, https: HTTPServer
) -> None:
    admin = connect(make_role("embedline_admin"))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        create_model(admin, https, os.devnull)
