"""Rows that hold the address of a file: only listed addresses are fetched, and a failure is the row's own."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from embedline.providers.files import FileFetcher
from pictures import picture
from support import create_pipeline, drain, scalar, settle
from upgrading import add_version, settle_versions, versions


@pytest.fixture
def photo(database: psycopg.Connection) -> psycopg.Connection:
    """A pipeline on table photo (id, address, etag), which is empty."""
    database.execute("CREATE TABLE photo (id bigint PRIMARY KEY, address text, etag text)")
    create_pipeline(
        database, "photo", "photo", "address", "towers", modality="image", changed_by="etag", caption="address"
    )
    return database


def _insert(connection: psycopg.Connection, key: int, address: str, etag: str = "1") -> None:
    connection.execute("INSERT INTO photo VALUES (%s, %s, %s)", (key, address, etag))


def _allow(connection: psycopg.Connection, prefix: str) -> None:
    connection.execute("INSERT INTO embedline.media_source VALUES (%s)", (prefix,))


def _embedded(connection: psycopg.Connection) -> set[int]:
    return {key for (key,) in connection.execute("SELECT id FROM photo_embedding").fetchall()}


def _letters(connection: psycopg.Connection) -> dict[int, str]:
    return dict(connection.execute("SELECT (key ->> 'id')::integer, message FROM embedline.dead_letter").fetchall())


def test_files_below_a_listed_folder_are_read_and_no_others(photo: psycopg.Connection, folder: Path) -> None:
    (folder / "link.png").symlink_to("/etc/passwd")
    (folder / "near.png").symlink_to(folder / "red.png")
    (folder / "inner").mkdir()
    addresses = {
        1: f"file://{folder}/red.png", 2: f"file://{folder}/near.png", 3: f"file://{folder}/link.png",
        4: f"file://{folder}/../../etc/passwd", 5: "file:///etc/passwd", 6: f"file://{folder}/%2e%2e/x",
        7: f"file://{folder}/none.png", 8: f"file://{folder}/inner", 9: "/etc/passwd", 10: f"file://localhost{folder}/red.png",
    }  # fmt: skip
    _insert(photo, 0, addresses[1])
    settle(photo)
    assert "embedline.media_source" in _letters(photo)[0]
    _allow(photo, f"file://{folder}/")
    for key, address in addresses.items():
        _insert(photo, key, address)
    settle(photo)
    assert _embedded(photo) == {1, 2}
    letters = _letters(photo)
    assert set(letters) == {0, *range(3, 11)}
    assert "link to another folder" in letters[3]
    assert "step to another folder" in letters[4]
    assert "no such file" in letters[7]
    assert "no regular file" in letters[8]


def test_a_file_is_fetched_again_when_what_the_row_says_of_it_changes(
    photo: psycopg.Connection, httpserver: HTTPServer
) -> None:
    address = httpserver.url_for("/shop/shoe.png") + "?signature=secret"
    httpserver.expect_request("/shop/shoe.png").respond_with_data(picture("red"))
    _allow(photo, httpserver.url_for("/shop/"))
    _insert(photo, 1, address)
    settle(photo)
    assert len(httpserver.log) == 1
    photo.execute("UPDATE photo SET id = id, address = address")
    settle(photo)
    assert len(httpserver.log) == 1
    before = scalar(photo, "SELECT embedding::text FROM photo_embedding")
    httpserver.clear_all_handlers()
    httpserver.expect_request("/shop/shoe.png").respond_with_data(picture("blue"))
    photo.execute("UPDATE photo SET etag = '2'")
    settle(photo)
    assert len(httpserver.log) == 2
    assert scalar(photo, "SELECT embedding::text FROM photo_embedding") != before


def test_addresses_that_are_not_listed_are_never_asked(photo: psycopg.Connection, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/shop/turn").respond_with_response(
        Response(status=302, headers={"Location": httpserver.url_for("/inner/secret")})
    )
    httpserver.expect_request("/shop/gone").respond_with_data("", status=410)
    httpserver.expect_request("/shop/page").respond_with_data("<html>no picture</html>")
    _allow(photo, httpserver.url_for("/shop/"))
    host = httpserver.url_for("/")
    addresses = [
        f"{host}inner/secret", f"{host}shop/../inner/secret", f"{host}shop/%2E%2E/inner/secret", f"{host}shop/turn",
        f"{host}shop/gone", f"{host}shop/page", f"{host}shop".replace("http://", "http://user@"), "http://169.254.169.254/shop/",
        "gopher://localhost/shop/", "not an address",
    ]  # fmt: skip
    for key, address in enumerate(addresses):
        _insert(photo, key, address)
    settle(photo)
    assert _embedded(photo) == set()
    assert set(_letters(photo)) == set(range(len(addresses)))
    assert {request.path for request, _ in httpserver.log} == {"/shop/turn", "/shop/gone", "/shop/page"}


def test_a_server_that_is_away_delays_its_rows_alone(
    photo: psycopg.Connection, httpserver: HTTPServer, folder: Path
) -> None:
    httpserver.expect_request("/busy.png").respond_with_data("", status=503)
    _allow(photo, httpserver.url_for("/"))
    _allow(photo, f"file://{folder}/")
    _insert(photo, 1, httpserver.url_for("/busy.png"))
    _insert(photo, 2, f"file://{folder}/red.png")
    drain(photo)
    assert _embedded(photo) == {2}
    assert _letters(photo) == {}
    assert "503" in scalar(photo, "SELECT last_error FROM embedline.status WHERE pipeline = 'photo'")
    httpserver.clear_all_handlers()
    httpserver.expect_request("/busy.png").respond_with_data(picture("green"))
    settle(photo)
    assert _embedded(photo) == {1, 2}


def test_another_version_fetches_each_file_again_and_tells_one_that_changed_unsaid(
    photo: psycopg.Connection, folder: Path
) -> None:
    _allow(photo, f"file://{folder}/")
    _insert(photo, 1, f"file://{folder}/red.png")
    _insert(photo, 2, f"file://{folder}/blue.png")
    settle(photo)
    (folder / "blue.png").write_bytes(picture("green"))
    add_version(photo, "towers", "photo", distance="l2")
    settle_versions(photo)
    assert versions(photo, "dead_letters", "photo") == {1: 0, 2: 1}
    message = scalar(photo, "SELECT message FROM embedline.version_dead_letter")
    assert "has changed" in message


def test_addresses_need_what_changes_with_them(photo: psycopg.Connection) -> None:
    refused = (
        ("create_pipeline('x', 'photo', 'address', 'static-256', changed_by => 'etag')", "images and recordings"),
        ("alter_pipeline('photo', content => 'etag')", "together"),
        ("alter_pipeline('photo', changed_by => 'address')", "together"),
        (
            "create_pipeline('x', 'photo', 'address', 'towers', modality => 'image', changed_by => 'etag) , (1')",
            "changed_by",
        ),
    )
    for call, message in refused:
        with pytest.raises(psycopg.Error, match=message):
            photo.execute(f"SELECT embedline.{call}")
    photo.execute("SELECT embedline.alter_pipeline('photo', content => $$'x' || address$$, changed_by => 'etag')")
    settle(photo)


def test_a_fetcher_that_was_closed_fetches_again(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/shoe.png").respond_with_data(b"a file")
    fetcher = FileFetcher()
    for _ in range(2):
        found = fetcher.submit(httpserver.url_for("/shoe.png"), (httpserver.url_for("/"),))
        assert found.result(10) == b"a file"
        fetcher.close()
