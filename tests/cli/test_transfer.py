"""embedline export, import and adopt: vectors leave, come back and are taken over without paying for them again."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow.parquet
import pytest
from psycopg import sql
from pytest_postgresql.executors import NoopExecutor

from command_line import Terminal, run
from conftest import cloned_database
from generated_names import MINE, Generated
from stub_fixtures import DIMENSIONS, running_stub, stub
from stub_provider import StubProvider, vector_of
from support import create_pages, create_pipeline, scalar, settle
from working import create_stub_model, dsn_of, unit_vectors

__all__ = ["running_stub", "stub"]

MakeRole = Callable[..., str]
Connect = Callable[..., psycopg.Connection]
FORMS = (".parquet", ".npz")
COPY, PAGE = Generated("copy"), Generated("page")


def done(connection: psycopg.Connection, *arguments: object) -> dict[str, Any]:
    """Run a command to a good end and return what it prints as JSON."""
    finished = run(dsn_of(connection), *map(str, arguments), "--json")
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def vectors_of(connection: psycopg.Connection, table: Generated) -> list[tuple[Any, ...]]:
    return connection.execute(
        f"SELECT c.content_hash, v.embedding_v1::text FROM {table('v1')} AS v JOIN {table('chunk')} AS c USING (chunk_id)"
        " ORDER BY 1, 2"
    ).fetchall()


def copy_source(connection: psycopg.Connection, **options: object) -> None:
    """Create table copy with the rows of page, and a pipeline that no worker touches yet."""
    connection.execute("CREATE TABLE copy (LIKE page INCLUDING ALL)")
    connection.execute("INSERT INTO copy SELECT * FROM page")
    with connection.transaction():
        create_pipeline(connection, "copy", "copy", **{"model": "stub", "index_method": "none", **options})
        connection.execute("SELECT embedline.pause_pipeline('copy')")


@pytest.fixture
def pages(database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline over 30 pages of several chunks, embedded by the stub."""
    create_stub_model(database, stub)
    create_pages(database, 30)
    database.execute("UPDATE page SET body = body || repeat(' rivers run to the sea and' || id, 60) WHERE id <= 5")
    create_pipeline(database, model="stub", index_method="none", chunk_tokens=64)
    settle(database)
    stub.forget()
    return database


# --- export


def test_an_export_has_rows_columns_and_the_recipe(pages: psycopg.Connection, tmp_path: Path) -> None:
    path = tmp_path / "page.parquet"
    told = done(pages, "export", "page", path, "--column", "views", "--column", "title")
    chunks = scalar(pages, f"SELECT count(*) FROM {PAGE('chunk')}")
    assert (told["rows"], told["missing"], told["bytes"]) == (chunks, 0, path.stat().st_size)
    table = pyarrow.parquet.read_table(path)
    assert table.num_rows == chunks > 30
    assert table.column_names[:6] == ["key", "chunk_seq", "chunk_start", "chunk_end", "chunk", "content_hash"]
    assert [str(table.schema.field(name).type) for name in ("views", "title")] == ["int32", "string"]
    metadata = json.loads(table.schema.metadata[b"embedline"])
    fingerprint = scalar(pages, "SELECT fingerprint FROM embedline.version")
    assert (metadata["fingerprint"], metadata["recipe"]["chunk tokens"]) == (fingerprint, 64)
    first = next(row for row in table.to_pylist() if (row["key"], row["chunk_seq"]) == ("1", 0))
    assert np.allclose(first["embedding"], unit_vectors([first["chunk"].strip()], DIMENSIONS)[0], atol=1e-6)
    assert first["title"] == "Title 1"


def test_numpy_reads_an_npz_by_its_names(pages: psycopg.Connection, tmp_path: Path) -> None:
    path = tmp_path / "page.npz"
    done(pages, "export", "page", path, "--column", "*")
    with np.load(path) as found:
        rows = [json.loads(line) for line in found["rows.jsonl"].splitlines()]
        assert json.loads(found["embedline.json"])["pipeline"] == "page"
        assert found["content_hashes"].shape == (len(rows), 16)
        expected = unit_vectors([row["chunk"].strip() for row in rows], DIMENSIONS)
        assert np.allclose(found["vectors"], expected, atol=1e-6)
    assert set(rows[0]) >= {"key", "chunk", "id", "title", "views"}


@pytest.mark.parametrize("form", FORMS)
def test_an_export_shows_what_row_level_security_shows(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole, tmp_path: Path, form: str
) -> None:
    reader = make_role("embedline_reader")
    pages.execute(sql.SQL("GRANT SELECT ON page TO {}").format(sql.Identifier(reader)))
    pages.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    pages.execute("CREATE POLICY few ON page USING (id IN (7, 9))")
    assert done(connect(reader), "export", "page", tmp_path / f"page{form}")["rows"] == 2
    stranger = make_role("embedline_reader")
    finished = run(dsn_of(connect(stranger)), "export", "page", str(tmp_path / f"none{form}"))
    assert (finished.returncode, "permission denied" in finished.stderr) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == [f"page{form}"], "no half of a file is left"


def test_a_failed_export_leaves_the_earlier_file(pages: psycopg.Connection, tmp_path: Path) -> None:
    path = tmp_path / "page.npz"
    path.write_text("earlier")
    for column in ("none", "key"):
        finished = run(dsn_of(pages), "export", "page", str(path), "--column", column)
        assert finished.returncode == 1 and f'no column "{column}"' in finished.stderr
    assert path.read_text() == "earlier"
    finished = run(dsn_of(pages), "export", "page", str(tmp_path / "nowhere" / "page.npz"))
    assert (finished.returncode, "No such file or directory" in finished.stderr) == (1, True)
    finished = run(dsn_of(pages), "export", "page", str(tmp_path / "page.csv"))
    assert finished.returncode == 1 and ".parquet, .npz" in finished.stderr
    finished = run(dsn_of(pages), "export", "page", str(path))
    assert (finished.returncode, finished.stdout[-30:]) == (0, "of version 1 of pipeline page.\n"[-30:])
    assert zipfile.is_zipfile(path) and os.listdir(tmp_path) == ["page.npz"]


def test_an_export_in_a_terminal_has_a_bar(pages: psycopg.Connection, tmp_path: Path) -> None:
    with Terminal(dsn_of(pages), "export", "page", str(tmp_path / "page.npz")) as terminal:
        assert terminal.wait() == 0
    assert "━" in terminal.text and "chunks of version 1 of pipeline page" in terminal.text


# --- import


@pytest.mark.parametrize(
    ("form", "options"),
    [(".parquet", {}), (".npz", {"column_type": "halfvec"}), (".parquet", {"distance": "l2"})],
    ids=["vector", "halfvec", "l2"],
)
def test_an_import_pays_for_nothing_and_gives_the_same_bits(
    pages: psycopg.Connection, stub: StubProvider, tmp_path: Path, form: str, options: dict[str, str]
) -> None:
    if options:
        pages.execute("SELECT embedline.drop_pipeline('page')")
        create_pipeline(pages, model="stub", index_method="none", chunk_tokens=64, **options)
        settle(pages)
    path = tmp_path / f"page{form}"
    exported = done(pages, "export", "page", path)
    copy_source(pages, chunk_tokens=64, **options)
    stub.forget()
    told = done(pages, "import", "copy", path, "--resume")
    assert stub.counts().get("texts", 0) == 0
    assert (told["taken"], told["unmatched"], told["embedded"]) == (told["lent"], 0, 0)
    assert (told["given"], told["chunks"]) == (exported["rows"], exported["rows"])
    assert vectors_of(pages, COPY) == vectors_of(pages, PAGE)
    assert scalar(pages, "SELECT count(*) FROM embedline.loan") == 0
    assert pages.execute("SELECT finding FROM embedline.verify('copy')").fetchall() == []


def test_another_database_takes_an_export_over(
    pages: psycopg.Connection, stub: StubProvider, template_server: NoopExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "page.parquet"
    done(pages, "export", "page", path)
    with (
        cloned_database(template_server, template_server.template_dbname) as dsn,
        psycopg.connect(dsn, autocommit=True) as elsewhere,
    ):
        # Other numbers of models, pipelines and chunks.
        create_stub_model(elsewhere, stub, "other")
        create_stub_model(elsewhere, stub, "mine")
        create_pages(elsewhere, 31, "mine")
        rows = pages.execute("SELECT id, title, body FROM page").fetchall()
        elsewhere.cursor().executemany(
            "UPDATE mine SET title = %s, body = %s WHERE id = %s", [(t, b, i) for i, t, b in rows]
        )
        with elsewhere.transaction():
            create_pipeline(elsewhere, "mine", "mine", model="mine", index_method="none", chunk_tokens=64)
            elsewhere.execute("SELECT embedline.pause_pipeline('mine')")
        stub.forget()
        told = done(elsewhere, "import", "mine", path, "--resume")
        assert (told["taken"], told["unmatched"], told["embedded"]) == (told["lent"], 0, 1)
        assert list(stub.texts_seen()) == [scalar(elsewhere, "SELECT title || E'\n\n' || body FROM mine WHERE id = 31")]
        assert set(vectors_of(pages, PAGE)) < set(vectors_of(elsewhere, MINE))


def test_what_does_not_match_is_embedded_as_usual_and_counted(
    pages: psycopg.Connection, stub: StubProvider, tmp_path: Path
) -> None:
    path = tmp_path / "page.npz"
    done(pages, "export", "page", path)
    copy_source(pages, chunk_tokens=64)
    pages.execute("UPDATE copy SET body = 'another text' WHERE id = 30")
    pages.execute("DELETE FROM copy WHERE id = 29")
    stub.forget()
    finished = run(dsn_of(pages), "import", "copy", str(path), "--resume")
    lent = scalar(pages, f"SELECT count(DISTINCT content_hash) FROM {PAGE('chunk')}")
    chunks = scalar(pages, f"SELECT count(*) FROM {COPY('chunk')}")
    assert finished.stdout == (
        f"taken: {lent - 2} of {lent} vectors; unmatched: 2; embedded by the model: 1 of {chunks} chunks.\n"
    )
    assert (finished.returncode, list(stub.texts_seen())) == (0, ["Title 30\n\nanother text"])


def test_a_paused_pipeline_keeps_what_was_lent_until_it_is_resumed(
    pages: psycopg.Connection, stub: StubProvider, tmp_path: Path
) -> None:
    path = tmp_path / "page.npz"
    done(pages, "export", "page", path)
    copy_source(pages, chunk_tokens=64)
    stub.forget()
    finished = run(dsn_of(pages), "import", "copy", str(path))
    assert finished.returncode == 3 and "SELECT embedline.resume_pipeline('copy');" in finished.stdout
    assert run(dsn_of(pages), "import", "copy", str(path), "--no-wait").returncode == 0
    pages.execute("SELECT embedline.resume_pipeline('copy')")
    settle(pages)
    assert stub.counts().get("texts", 0) == 0
    told = pages.execute("SELECT lent = taken, chunks = lent_chunks FROM embedline.end_loan('copy')").fetchall()
    assert told == [(True, True)]


def test_a_version_beside_the_serving_one_takes_vectors_too(
    pages: psycopg.Connection, stub: StubProvider, tmp_path: Path
) -> None:
    path = tmp_path / "page.npz"
    copy_source(pages, chunk_tokens=64, column_type="halfvec")
    pages.execute("SELECT embedline.resume_pipeline('copy')")
    settle(pages)
    done(pages, "export", "copy", path)
    create_stub_model(pages, stub, "other", document_prefix="passage: ")
    pages.execute("SELECT embedline.add_embedding_version('page', 'other')")
    finished = run(dsn_of(pages), "import", "page", str(path), "--version", "2")
    assert finished.returncode == 1
    assert "document prefix of the model: '' in the file, 'passage: ' here" in finished.stderr
    pages.execute("SELECT embedline.drop_embedding_version('page', 2, '0')")
    # Rounded to float16, they are no vectors of the serving version, which has more of each.
    assert "column type: 'halfvec' in the file, 'vector' here" in run(dsn_of(pages), "import", "page", str(path)).stderr


def test_a_file_of_something_else_is_refused(pages: psycopg.Connection, tmp_path: Path) -> None:
    arrow = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), arrow)
    (tmp_path / "text.parquet").write_text("text")
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name, told in (
        ("other.parquet", "was not written by embedline export"), ("text.parquet", "is no Parquet file"),
        ("text.npz", "is no .npz file"), ("other.npz", "was not written by embedline export"),
        ("none.npz", "No such file"), ("none.parquet", "No such file"),
    ):  # fmt: skip
        finished = run(dsn_of(pages), "import", "page", str(tmp_path / name))
        assert (finished.returncode, told in finished.stderr) == (1, True), finished.stderr


def test_lending_is_for_the_owner_of_the_source_and_for_sound_vectors(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    admin = connect(make_role("embedline_admin"))
    zero, short = DIMENSIONS.to_bytes(2, "big") + bytes(2 + 4 * DIMENSIONS), b"short"
    digest = "00000000-0000-0000-0000-000000000001"
    add = "SELECT embedline.add_loan('page', NULL, ARRAY[%s::uuid], ARRAY[%s::bytea])"
    for statement in ("SELECT * FROM embedline.end_loan('page')", "SELECT count(*) FROM embedline.loan_vector"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            admin.execute(statement)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="must be owner"):
        admin.execute(add, (digest, zero))
    for vector, told in ((zero, "norm zero"), (short, r"is no vector\(8\)")):
        with pytest.raises(psycopg.Error, match=told):
            pages.execute(add, (digest, vector))
    two = DIMENSIONS.to_bytes(2, "big") + bytes(2) + np.full(DIMENSIONS, 2, ">f4").tobytes()
    with pytest.raises(psycopg.Error, match=r"has norm 5\.6569; those of distance cosine have norm 1"):
        pages.execute(add, (digest, two))


def test_what_was_lent_is_removed_after_its_time_and_with_its_version(pages: psycopg.Connection) -> None:
    unit = DIMENSIONS.to_bytes(2, "big") + bytes(2) + np.eye(1, DIMENSIONS, dtype=">f4").tobytes()
    add = (
        "SELECT embedline.add_loan('page', NULL, ARRAY['00000000-0000-0000-0000-000000000001'::uuid], ARRAY[%s::bytea])"
    )
    assert [scalar(pages, add, (unit,)) for _ in range(2)] == [1, 0]
    pages.execute("SELECT embedline._purge_loans()")
    assert scalar(pages, "SELECT count(*) FROM embedline.loan_vector") == 1
    pages.execute("UPDATE embedline.loan SET expires_at = now() - interval '1 second'")
    pages.execute("SELECT embedline._purge_loans()")
    assert scalar(pages, "SELECT count(*) FROM embedline.loan_vector") == 0
    pages.execute(add, (unit,))
    pages.execute("SELECT embedline.drop_pipeline('page')")
    assert scalar(pages, "SELECT count(*) FROM embedline.loan_vector") == 0


# --- adopt


@pytest.fixture
def store(database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A source of 30 rows, and a table as pgai's vectorizers keep them, with vectors of the stub."""
    create_stub_model(database, stub)
    create_pages(database, 30)
    database.execute(
        "CREATE TABLE page_embedding_store (embedding_uuid uuid PRIMARY KEY DEFAULT gen_random_uuid(), id integer NOT NULL,"
        f" chunk_seq integer NOT NULL, chunk text NOT NULL, embedding vector({DIMENSIONS}) NOT NULL, UNIQUE (id, chunk_seq))"
    )
    for key, body in database.execute("SELECT id, body FROM page").fetchall():
        vector = "[" + ",".join(map(str, vector_of(body, DIMENSIONS).tolist())) + "]"
        database.execute(
            "INSERT INTO page_embedding_store (id, chunk_seq, chunk, embedding) VALUES (%s, 0, %s, %s::vector)",
            (key, f" {body}\n", vector),
        )
    stub.forget()
    return database


NEW = ("--model", "stub", "--source", "page", "--content", "body")


def test_pgais_store_becomes_version_1_of_a_new_pipeline(store: psycopg.Connection, stub: StubProvider) -> None:
    told = done(store, "adopt", "page", "page_embedding_store", *NEW)
    assert (told["created"], told["taken"], told["unmatched"], told["embedded"], told["chunks"]) == (True, 30, 0, 0, 30)
    assert told["checked"]["compared"] == 20 and told["checked"]["of_another_model"] == 0
    # Only the sample that was compared.
    assert stub.counts()["texts"] <= 21
    assert store.execute("SELECT finding FROM embedline.verify('page')").fetchall() == []
    assert store.execute("SELECT state, pending FROM embedline.status").fetchall() == [("active", 0)]


def test_vectors_of_another_model_are_refused_and_nothing_is_created(
    store: psycopg.Connection, stub: StubProvider
) -> None:
    store.execute("UPDATE page_embedding_store SET chunk = chunk || 'other' WHERE id = 3")
    finished = run(dsn_of(store), "adopt", "page", "page_embedding_store", *NEW, "--sample", "30")
    assert finished.returncode == 1 and "1 of 30 sampled vectors of page_embedding_store are not" in finished.stderr
    assert scalar(store, "SELECT count(*) FROM embedline.pipeline") == 0
    told = done(store, "adopt", "page", "page_embedding_store", *NEW, "--sample", "30", "--force")
    assert (told["taken"], told["unmatched"], told["embedded"]) == (29, 1, 1)


def test_other_cuts_are_told_before_anything_is_paid_for(store: psycopg.Connection, stub: StubProvider) -> None:
    store.execute("UPDATE page SET body = body || ' with more to say' WHERE id > 10")
    told = done(store, "adopt", "page", "page_embedding_store", *NEW, "--dry-run", "--sample", "1")
    assert (told["matching"], told["compared"]) == (10, 30)
    assert scalar(store, "SELECT count(*) FROM embedline.pipeline") == 0
    finished = run(dsn_of(store), "adopt", "page", "page_embedding_store", *NEW, "--dry-run", "--sample", "1")
    assert finished.stdout == (
        "10 of 30 chunks of a sample of the source find a vector in page_embedding_store. Nothing was changed.\n"
    )


def test_the_other_tool_s_cuts_are_kept_by_watching_its_table(store: psycopg.Connection, stub: StubProvider) -> None:
    store.execute("UPDATE page SET body = body || ' with more to say'")
    kept = ("--model", "stub", "--source", "page_embedding_store", "--content", "chunk", "--chunking", "none")
    told = done(store, "adopt", "kept", "page_embedding_store", *kept)
    assert (told["taken"], told["unmatched"], told["embedded"], told["chunks"]) == (30, 0, 0, 30)


def test_unusable_rows_are_left_out_and_named(store: psycopg.Connection, stub: StubProvider) -> None:
    store.execute("CREATE TABLE mine AS SELECT chunk AS t, embedding::real[] AS e FROM page_embedding_store")
    store.execute("UPDATE mine SET e[1] = 'NaN' WHERE t ~ 'number 1 '")
    store.execute("UPDATE mine SET e = array_fill(0::real, ARRAY[8]) WHERE t ~ 'number 2 '")
    store.execute("UPDATE mine SET e = NULL WHERE t ~ 'number 3 '")
    store.execute("UPDATE mine SET t = ' ' WHERE t ~ 'number 4 '")
    finished = run(dsn_of(store), "adopt", "page", "mine", *NEW, "--chunk", "t", "--embedding", "e")
    for told in ("not a finite number", "norm zero", "the vector is NULL", "the text is empty"):
        assert told in finished.stderr
    assert finished.stdout == "taken: 26 of 26 vectors; unmatched: 0; embedded by the model: 4 of 30 chunks.\n"


def test_a_table_that_does_not_fit_is_refused(store: psycopg.Connection, stub: StubProvider) -> None:
    store.execute("CREATE TABLE narrow AS SELECT 'x'::text AS chunk, '[1,2]'::vector(2) AS embedding")
    store.execute("CREATE TABLE loose AS SELECT 'x'::text AS chunk, '[1,2]'::vector AS embedding")
    store.execute("CREATE TABLE texts AS SELECT 'x'::text AS chunk, 'y'::text AS embedding")
    cases = {
        "narrow": 'have 2 dimensions, model "stub" has 8',
        "loose": 'have 2 dimensions, model "stub" has 8',
        "texts": "has type text",
        "page": 'page has no column "chunk"',
        "none": 'there is no table "none"',
    }
    for table, told in cases.items():
        finished = run(dsn_of(store), "adopt", "page", table, *NEW)
        assert (finished.returncode, told in finished.stderr) == (1, True), finished.stderr
    finished = run(dsn_of(store), "adopt", "page", "page_embedding_store", "--model", "stub")
    assert finished.returncode == 1 and "--source TABLE --content 'EXPRESSION' creates it" in finished.stderr
    assert scalar(store, "SELECT count(*) FROM embedline.pipeline") == 0


def test_an_existing_pipeline_takes_what_it_lacks(store: psycopg.Connection, stub: StubProvider) -> None:
    create_pipeline(store, "page", "page", "body", "stub", index_method="none")
    finished = run(dsn_of(store), "adopt", "page", "page_embedding_store", *NEW)
    assert finished.returncode == 1 and 'there is a pipeline "page" already' in finished.stderr
    finished = run(dsn_of(store), "adopt", "page", "page_embedding_store", "--model", "minilm")
    assert finished.returncode == 1 and 'has model "stub", not "minilm"' in finished.stderr
    told = done(store, "adopt", "page", "page_embedding_store", "--model", "stub")
    assert (told["created"], told["taken"], told["embedded"]) == (False, 30, 0)


def test_adopting_needs_the_rights_on_source_and_table(
    store: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role = make_role("embedline_admin")
    admin = connect(role)
    store.execute(sql.SQL("GRANT SELECT ON page, page_embedding_store TO {}").format(sql.Identifier(role)))
    finished = run(dsn_of(admin), "adopt", "page", "page_embedding_store", *NEW)
    assert finished.returncode == 1 and "must be owner" in finished.stderr
    store.execute(sql.SQL("ALTER TABLE page OWNER TO {}").format(sql.Identifier(role)))
    store.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(role)))
    store.execute("ALTER TABLE page_embedding_store ENABLE ROW LEVEL SECURITY")
    store.execute("CREATE POLICY few ON page_embedding_store USING (id <= 10)")
    told = done(admin, "adopt", "page", "page_embedding_store", *NEW)
    assert (told["given"], told["taken"], told["embedded"]) == (10, 10, 20)
