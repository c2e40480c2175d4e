"""The gate: what evaluate measures of versions of the manual's pages, what it decides, and what it refuses.

The serving version has static-256. Beside it: the same vectors turned (as good, and nothing in common by value), and the same
vectors cut to 16 dimensions (bad).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from conftest import Connect, MakeRole
from embedline.dev.cluster.models import cut_static_model
from embedline.dev.demo import manual
from generated_names import PAGE
from support import MODELS, create_pages, create_pipeline, drain, scalar, settle, wait_until

SEEDS = range(20)
SERVING, GOOD, BAD = 1, 2, 3


@pytest.fixture(scope="module")
def models() -> Iterator[Path]:
    """Directories of two models made of static-256, readable for the server: turned, and cut to 16 dimensions."""
    from safetensors.numpy import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="embedline-models-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        cut_static_model(MODELS / "static-256", 16, folder / "cut-16")
        cut_static_model(MODELS / "static-256", 256, folder / "turned")
        weights = folder / "turned" / "model.safetensors"
        rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(256, 256)))[0].astype(np.float32)
        save_file({key: (table @ rotation) for key, table in load_file(weights).items()}, weights)
        weights.chmod(0o644)
        yield folder


def _add_version(
    connection: psycopg.Connection, model: str, *, operator_class: str = "vector_cosine_ops", **options: Any
) -> int:
    """Add a version, fill it, and build its index."""
    named = "".join(f", {option} => %s" for option in options)
    number = int(
        scalar(
            connection,
            f"SELECT embedline.add_embedding_version('page', %s{named})",
            (model, *options.values()),
        )
    )

    def complete() -> bool:
        drain(connection)
        query = (
            "SELECT v.state = 'complete' FROM embedline.version AS v JOIN embedline.pipeline AS p USING (pipeline_id)"
            " WHERE p.name = 'page' AND v.number = %s"
        )
        return bool(scalar(connection, query, (number,)))

    wait_until(complete, 120, "the version is complete")
    _build_index(connection, number, operator_class)
    return number


def _build_index(connection: psycopg.Connection, number: int, operator_class: str = "vector_cosine_ops") -> None:
    names = (f"page_v{number}_embedding_idx", f"page_v{number}", f"embedding_v{number}", operator_class)
    statement = sql.SQL("CREATE INDEX {} ON embedline_data.{} USING hnsw ({} {})")
    connection.execute(statement.format(*map(sql.Identifier, names)))


@pytest.fixture(scope="module")
def pages(module_database: psycopg.Connection, models: Path) -> psycopg.Connection:
    """Command reference pages with three versions, and table canary: the manual's index terms with the pages they point to."""
    connection = module_database
    folder = manual.manual_folder(connection.info.server_version // 10000)
    found = [page for page in manual.read_pages(folder) if page.name.startswith(("sql-a", "sql-c", "app-"))]
    connection.execute("CREATE TABLE page (name text PRIMARY KEY, title text, body text, kind text)")
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO page VALUES (%s, %s, %s, %s)",
            [(page.name, page.title, page.body, page.name.partition("-")[0]) for page in found],
        )
    names = {page.name for page in found}
    terms = [(t, page) for t, pages in manual.read_index_terms(folder).items() for page in sorted(pages & names)]
    connection.execute("CREATE TABLE canary (query text NOT NULL, key text NOT NULL, grade numeric NOT NULL DEFAULT 1)")
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO canary VALUES (%s, %s)", terms)
    for model in ("turned", "cut-16"):
        connection.execute(
            "SELECT embedline.create_model(%s, 'sentence-transformers', %s)", (model, str(models / model))
        )
    create_pipeline(connection)
    settle(connection, 120)
    _build_index(connection, SERVING)
    assert (_add_version(connection, "turned"), _add_version(connection, "cut-16")) == (GOOD, BAD)
    connection.execute("ANALYZE")
    return connection


def _evaluate(connection: psycopg.Connection, version: int, **options: Any) -> dict[str, Any]:
    """Return evaluate's rows by measure, each as a mapping."""
    named = "".join(f", {option} => %s" for option in options)
    cursor = connection.execute(f"SELECT * FROM embedline.evaluate('page', %s{named})", (version, *options.values()))
    assert cursor.description is not None
    names = [column.name for column in cursor.description]
    return {row[0]: dict(zip(names, row, strict=True)) for row in cursor}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_model_is_always_refused(pages: psycopg.Connection, seed: int) -> None:
    rows = _evaluate(pages, BAD, seed=seed, query_count=200)
    assert rows["verdict"]["verdict"] == "fail"
    assert rows["nDCG@10"]["verdict"] == "fail"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_good_model_is_never_refused_by_its_index(pages: psycopg.Connection, seed: int) -> None:
    pages.execute(f"DROP INDEX {PAGE.index(2)}")
    _build_index(pages, GOOD)
    rows = _evaluate(pages, GOOD, seed=seed, query_count=200)
    fidelity = rows["index recall@10"]
    assert fidelity["verdict"] == "pass"
    assert fidelity["low"] <= fidelity["new"] <= 1
    assert "page_v2_embedding_idx" in fidelity["detail"]
    assert rows["nDCG@10"]["verdict"] != "fail"


def test_as_good_a_model_passes_and_a_bad_one_fails_on_canaries(pages: psycopg.Connection) -> None:
    good, bad = (_evaluate(pages, version, canaries="canary", margin=0.05) for version in (GOOD, BAD))
    assert good["verdict"]["verdict"] == "pass"
    assert good["nDCG@10"]["difference"] == pytest.approx(0, abs=0.01)
    assert bad["verdict"]["verdict"] == "fail"
    assert bad["nDCG@10"]["high"] < -0.05
    for measure in ("nDCG@10", "recall@10", "MRR@10"):
        assert good[measure]["old"] == bad[measure]["old"]
        assert 0 < bad[measure]["new"] < good[measure]["new"] <= 1
    assert good["overlap@10"]["new"] > 0.9 > bad["overlap@10"]["new"]
    for measure in ("embedding p50 ms", "embedding p95 ms", "search p50 ms", "search p95 ms"):
        assert good[measure]["old"] > 0
        assert good[measure]["new"] > 0


def test_two_points_on_fifty_canaries_are_inconclusive_and_it_says_how_many_decide(pages: psycopg.Connection) -> None:
    # One page's vectors are taken from the new version: of fifty queries that both answer at once, one is lost.
    pages.execute("CREATE TABLE fifty AS SELECT title AS query, name AS key FROM page WHERE false")
    hits = pages.execute(
        "SELECT p.title, p.name FROM page AS p"
        " WHERE (SELECT s.key FROM embedline.search('page', p.title, 1, true) AS s) = p.name ORDER BY p.name LIMIT 50"
    ).fetchall()
    assert len(hits) == 50
    with pages.cursor() as cursor:
        cursor.executemany("INSERT INTO fifty VALUES (%s, %s)", hits)
    with pages.transaction(force_rollback=True):
        pages.execute(
            f"DELETE FROM {PAGE.version(2)} WHERE chunk_id IN"
            f" (SELECT chunk_id FROM {PAGE('chunk')} WHERE key_name = %s)",
            (hits[0][1],),
        )
        rows = _evaluate(pages, GOOD, canaries="fifty")
    assert rows["nDCG@10"]["difference"] == pytest.approx(-0.02, abs=0.002)
    assert rows["nDCG@10"]["verdict"] == rows["verdict"]["verdict"] == "inconclusive"
    assert "queries would decide" in rows["nDCG@10"]["detail"]


def test_the_evidence_is_stored_with_the_version(pages: psycopg.Connection) -> None:
    rows = _evaluate(pages, BAD, query_count=100, seed=7, margin=0.02)
    stored = pages.execute(
        "SELECT e.kind, e.verdict, e.fidelity_verdict, e.quality_verdict, e.query_source, e.query_count, e.k, e.margin, e.seed,"
        " e.baseline_number, e.fingerprint = v.fingerprint, e.evidence, e.evaluated_by"
        " FROM embedline.evaluation AS e JOIN embedline.version AS v USING (version_id) ORDER BY evaluation_id DESC LIMIT 1"
    ).fetchone()
    assert stored is not None
    assert stored[:4] == ("gate", "fail", rows["index recall@10"]["verdict"], "fail")
    # Chunks that are alike make one query.
    assert stored[4] == "known_item"
    assert 95 <= stored[5] <= 100
    assert stored[6:11] == (10, 0.02, 7, SERVING, True)
    assert stored[11]["models"] == ["static-256", "cut-16"]
    assert [row["measure"] for row in stored[11]["rows"]] == list(rows)
    assert stored[12] == pages.info.user


def test_the_same_seed_asks_the_same(pages: psycopg.Connection) -> None:
    first, again, other = (_evaluate(pages, BAD, query_count=100, seed=seed)["nDCG@10"] for seed in (1, 1, 2))
    assert first == again
    assert first["old"] != other["old"]


def test_the_serving_version_has_its_own_figures_alone_and_never_a_pass(pages: psycopg.Connection) -> None:
    rows = _evaluate(pages, SERVING, canaries="canary")
    assert rows["verdict"]["verdict"] == "inconclusive"
    assert rows["index recall@10"]["verdict"] == "pass"
    assert "overlap@10" not in rows
    assert rows["nDCG@10"]["old"] is None
    assert rows["nDCG@10"]["low"] < rows["nDCG@10"]["new"] < rows["nDCG@10"]["high"]
    assert "serves" in rows["verdict"]["detail"]


def test_groups_are_reported_and_those_that_fall_are_alarms(pages: psycopg.Connection) -> None:
    rows = _evaluate(pages, BAD, breakdown="kind")
    assert rows["nDCG@10, kind = sql"]["verdict"] == rows["nDCG@10, kind = app"]["verdict"] == "alarm"
    rows = _evaluate(pages, GOOD, canaries="canary", breakdown="kind")
    assert rows["nDCG@10, kind = sql"]["verdict"] is None
    with pytest.raises(psycopg.errors.InvalidParameterValue, match='no column "tenant"') as caught:
        _evaluate(pages, GOOD, breakdown="tenant")
    assert "kind" in caught.value.diag.message_hint


def test_the_planner_is_left_as_it_was(pages: psycopg.Connection) -> None:
    with pages.transaction():
        # None of these stops the gate, or search's index from being measured.
        for switch in ("enable_sort", "enable_indexscan", "enable_nestloop"):
            pages.execute(f"SET LOCAL {switch} = off".encode())
        _evaluate(pages, GOOD, query_count=20)
        assert scalar(pages, "SHOW enable_sort") == "off"
        assert scalar(pages, "SHOW enable_seqscan") == "on"


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ("key text", "", "no column query"),
        ("query text, answer text", "", "no column key"),
        ("query integer, key text", "", "column query of .* is of type integer"),
        ("query text, key text, grade text", "", "column grade of .* is of type text"),
        ("query text, key text", "", "is empty"),
        ("query text, key text", "('a', NULL)", "1 rows of .* have no query, no key"),
        ("query text, key text", "('a', 'no-such-page.html')", "no key in .* is that of an embedded row"),
        ("query text, key text", "('  ', 'sql-abort.html')", "has no text in it"),
        ("query text, key text", "(U&'\\200B', 'sql-abort.html')", "has no text in it"),
        ("query text, key text, grade numeric", "('a', 'sql-abort.html', 0)", "no grade in .* is above 0"),
        ("query text, key text, grade numeric", "('a', 'sql-abort.html', NULL)", "no query, no key or no grade"),
        ("query text, key text, grade numeric", "('a', 'sql-abort.html', 'Infinity')", "is not finite"),
        ("query text, key text, grade numeric", "('a', 'sql-abort.html', 'NaN')", "is not finite"),
        ("query text, key text, grade numeric", "('a', 'sql-abort.html', 1e400)", "is not finite, or beyond 1000000"),
        ("query text, key text, grade real", "('a', 'sql-abort.html', -1e30)", "is not finite, or beyond 1000000"),
        ("query text, key text, grade numeric", "('a', 'sql-abort.html', 1e-400)", "no grade in .* is above 0"),
        ("query text, key text, grade money", "", "column grade of .* is of type money"),
    ],
)
def test_canaries_that_cannot_be_used_are_refused(
    pages: psycopg.Connection, columns: str, rows: str, message: str
) -> None:
    with pages.transaction(force_rollback=True):
        pages.execute(f"CREATE TABLE unusable ({columns})")
        if rows:
            pages.execute(f"INSERT INTO unusable VALUES {rows}")
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=message) as caught, pages.transaction():
            _evaluate(pages, GOOD, canaries="unusable")
        hint = str(caught.value.diag.message_hint)
        assert hint
        if hint.startswith("DELETE"):
            assert pages.execute(hint.encode()).rowcount == 1


def test_canaries_of_rows_that_are_gone_are_left_out_and_counted(pages: psycopg.Connection) -> None:
    with pages.transaction(force_rollback=True):
        pages.execute("CREATE TABLE stale (query varchar(200), key text, grade integer)")
        pages.execute(
            "INSERT INTO stale VALUES ('abort a transaction', 'sql-abort.html', 2), ('abort a transaction', 'gone.html', 1),"
            " ('abort a transaction', 'sql-abort.html', 1), ('nothing is left', 'gone.html', 1)"
        )
        rows = _evaluate(pages, GOOD, canaries="stale")
    assert "1 canaries of " in rows["verdict"]["detail"]
    assert "1 keys of rows that are not embedded left out" in rows["verdict"]["detail"]
    assert "1 queries without an answer left out" in rows["verdict"]["detail"]
    assert rows["recall@10"]["old"] == 1


@pytest.mark.parametrize("call", ["search('page', 'abort', NULL)", "preview_version('page', 'turned', sample => NULL)"])
def test_null_is_no_number(pages: psycopg.Connection, call: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="must not be NULL"):
        pages.execute(f"SELECT * FROM embedline.{call}".encode())


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"k": 101},
        {"k": None},
        {"seed": None},
        {"margin": None},
        {"margin": -0.1},
        {"margin": float("nan")},
        {"query_count": 0},
        {"seed": -1},
        {"min_recall": 0},
    ],
)
def test_values_out_of_bounds_are_refused(pages: psycopg.Connection, options: dict[str, Any]) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=next(iter(options))):
        _evaluate(pages, GOOD, **options)


def test_a_corpus_without_more_queries_asks_for_canaries(database: psycopg.Connection, models: Path) -> None:
    create_pages(database, 20)
    database.execute("SELECT embedline.create_model('cut-16', 'sentence-transformers', %s)", (str(models / "cut-16"),))
    create_pipeline(database, index_method="none")
    settle(database)
    database.execute("SELECT embedline.add_embedding_version('page', 'cut-16')")
    wait_until(lambda: drain(database) == 0 and _is_complete(database), 60, "the version is complete")
    detail = _evaluate(database, 2, query_count=500)["nDCG@10"]["detail"]
    assert "the corpus gives no more: take canaries" in detail or "would decide" not in detail


def _is_complete(connection: psycopg.Connection) -> bool:
    return bool(scalar(connection, "SELECT state = 'complete' FROM embedline.versions WHERE version = 2"))


def test_an_index_that_finds_too_little_is_refused_with_advice(pages: psycopg.Connection) -> None:
    rows = _evaluate(pages, GOOD, query_count=50, min_recall=1.0)
    assert rows["index recall@10"]["verdict"] in ("pass", "inconclusive", "fail")
    if rows["index recall@10"]["verdict"] != "pass":
        assert "ef_search" in rows["index recall@10"]["detail"]


def test_a_preview_names_itself_and_opens_nothing(pages: psycopg.Connection) -> None:
    rows = pages.execute(
        "SELECT * FROM embedline.preview_version('page', 'turned', 'canary', sample => 800, margin => 0.05)"
    ).fetchall()
    assert all(row[0].startswith("preview: ") for row in rows)
    shown = {row[0].removeprefix("preview: "): row for row in rows}
    # Turned vectors are what the bridge finds back whole.
    assert shown["bridge cosine"][2] > 0.999
    assert shown["verdict"][6] == "pass"
    assert "opens no cutover" in shown["verdict"][7]
    assert scalar(pages, "SELECT kind FROM embedline.evaluation ORDER BY evaluation_id DESC LIMIT 1") == "preview"
    worse = pages.execute("SELECT * FROM embedline.preview_version('page', 'cut-16', sample => 800)").fetchall()
    assert worse[0][6] == "fail"


def test_a_version_that_is_not_ready_is_refused_with_what_to_do(database: psycopg.Connection) -> None:
    create_pages(database, 40)
    create_pipeline(database)
    settle(database)
    with pytest.raises(psycopg.Error, match="no valid vector index") as caught:
        _evaluate(database, 1)
    assert "build_vector_index" in caught.value.diag.message_hint
    _build_index(database, 1)
    database.execute("SELECT embedline.add_embedding_version('page', 'static-256', column_type => 'halfvec')")
    with pytest.raises(psycopg.Error, match=r"version 2 .* is not complete") as caught:
        _evaluate(database, 2)
    assert "embedline.versions" in caught.value.diag.message_hint
    with pytest.raises(psycopg.errors.UndefinedObject, match="no version 9"):
        _evaluate(database, 9)


def test_a_version_without_an_index_is_searched_exactly(database: psycopg.Connection) -> None:
    create_pages(database, 40)
    create_pipeline(database, index_method="none")
    settle(database)
    rows = _evaluate(database, 1)
    assert rows["index recall@10"]["verdict"] == "pass"
    assert "exact" in rows["index recall@10"]["detail"]


@pytest.mark.parametrize(
    ("options", "operator_class"),
    [
        ({"column_type": "halfvec"}, "halfvec_cosine_ops"),
        ({"distance": "l2"}, "vector_l2_ops"),
        ({"distance": "inner_product"}, "vector_ip_ops"),
    ],
)
def test_every_distance_and_type_is_measured_as_it_is_stored(
    database: psycopg.Connection, options: dict[str, Any], operator_class: str
) -> None:
    create_pages(database, 300)
    create_pipeline(database)
    settle(database)
    _add_version(database, "static-256", operator_class=operator_class, **options)
    rows = _evaluate(database, 2, query_count=60)
    assert rows["index recall@10"]["new"] > 0.95
    assert rows["index recall@10"]["verdict"] == "pass"


def test_keys_of_several_columns_are_those_that_search_returns(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer, lang text, title text, body text, PRIMARY KEY (id, lang))")
    database.execute(
        "INSERT INTO page SELECT n, l, 'Title ' || n, 'Body about ' || (ARRAY['rivers', 'law', 'bread'])[1 + n % 3] || n"
        " FROM generate_series(1, 20) AS n, unnest('{en,\"d,e\"}'::text[]) AS l"
    )
    create_pipeline(database)
    settle(database)
    _build_index(database, 1)
    database.execute(
        "CREATE TABLE canary AS SELECT 'Title ' || n AS query, (SELECT s.key FROM embedline.search('page', 'Title ' || n, 1)"
        " AS s) AS key FROM generate_series(1, 20) AS n"
    )
    assert _evaluate(database, 1, canaries="canary", breakdown="lang")["recall@10"]["new"] == 1
    database.execute("UPDATE canary SET key = '7'")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="no key of 2 columns"):
        _evaluate(database, 1, canaries="canary")
    database.execute('UPDATE canary SET key = \'["x", "en"]\'')
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="no key of pipeline"):
        _evaluate(database, 1, canaries="canary")


def test_who_may_measure(database: psycopg.Connection, connect: Connect, make_role: MakeRole) -> None:
    create_pages(database, 40)
    create_pipeline(database)
    settle(database)
    _build_index(database, 1)
    administrator, reader = make_role("embedline_admin"), make_role("embedline_reader")
    for role in (administrator, reader):
        database.execute(sql.SQL("GRANT SELECT ON page TO {}").format(sql.Identifier(role)))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        _evaluate(connect(reader), 1)
    session = connect(administrator)
    assert _evaluate(session, 1)["index recall@10"]["verdict"] == "pass"
    assert scalar(session, "SELECT evaluated_by FROM embedline.evaluation") == administrator
    database.execute("CREATE TABLE secret (query text, key text)")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="secret"):
        _evaluate(session, 1, canaries="secret")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="owner of the source"):
        session.execute("SELECT * FROM embedline.preview_version('page', 'minilm')")


def test_a_preview_keeps_to_the_budget(database: psycopg.Connection) -> None:
    create_pages(database, 300)
    create_pipeline(database)
    settle(database)
    database.execute("SELECT embedline.set_budget('day', model => 'minilm', tokens => 10)")
    with pytest.raises(psycopg.Error, match="more than may be sent now") as caught:
        database.execute("SELECT * FROM embedline.preview_version('page', 'minilm', sample => 200)")
    assert "preview_version" in caught.value.diag.message_hint
    assert scalar(database, "SELECT count(*) FROM embedline.reservation") == 0


def test_each_precision_index_is_shown_and_the_one_that_search_uses_decides(database: psycopg.Connection) -> None:
    create_pages(database, 400)
    create_pipeline(database)
    settle(database)
    _build_index(database, 1)
    database.execute("SELECT embedline.add_precision_index('page', 1, 'halfvec')")
    database.execute("SELECT embedline.add_precision_index('page', 1, 'prefix', 16, oversampling => 1)")
    assert "own index, bytes" not in _evaluate(database, 1, query_count=50)
    for name in ("halfvec", "prefix_16"):
        statement = scalar(database, "SELECT embedline.index_statement('page', 1, %s)", (name,))
        database.execute(statement)
    rows = _evaluate(database, 1, query_count=50)
    assert rows["own index, recall@10"]["new"] == rows["index recall@10"]["new"] > 0.95
    assert rows["halfvec index, recall@10"]["new"] > 0.95
    assert rows["prefix_16 index, recall@10"]["new"] < rows["halfvec index, recall@10"]["new"]
    assert rows["prefix_16 index, bytes"]["new"] < rows["halfvec index, bytes"]["new"] < rows["own index, bytes"]["new"]
    assert rows["halfvec index, search p95 ms"]["new"] > 0
    database.execute("SELECT embedline.use_precision('page', 1, 'prefix_16')")
    poor = _evaluate(database, 1, query_count=50, min_recall=0.99)
    assert poor["index recall@10"]["new"] == poor["prefix_16 index, recall@10"]["new"]
    assert poor["index recall@10"]["verdict"] == "fail"
    assert "larger m" in poor["index recall@10"]["detail"] or "ef_search" in poor["index recall@10"]["detail"]
    assert poor["verdict"]["verdict"] == "fail"
    database.execute("SELECT embedline.add_precision_index('page', 1, 'binary', oversampling => 1)")
    database.execute(scalar(database, "SELECT embedline.index_statement('page', 1, 'binary')"))
    database.execute("SELECT embedline.use_precision('page', 1, 'binary')")
    assert "oversampling above 1" in _evaluate(database, 1, min_recall=1)["index recall@10"]["detail"]
