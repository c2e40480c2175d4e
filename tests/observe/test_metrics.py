"""The metrics that Prometheus reads: their form and their values."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import Connect, MakeRole
from embedline.observe.metric_names import BY_NAME, PREFIX
from generated_names import PAGE
from stub_provider import StubProvider
from support import drain, scalar
from working import create_stub_model, create_stub_pipeline, insert_rows

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def pages(stub_database: psycopg.Connection, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """A pipeline on the stub with 30 rows from before it, none embedded."""
    create_stub_model(stub_database, stub, price_per_million_tokens=1_000_000)
    create_stub_pipeline(stub_database, rows=30)
    yield stub_database


def samples_of(connection: psycopg.Connection) -> Samples:
    """Scrape; return each sample by its name without the prefix and its labels."""
    families = text_string_to_metric_families(str(scalar(connection, "SELECT embedline.metrics()")))
    return {
        (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """Return the value of one sample."""
    return samples[name, frozenset(labels.items())]


def test_each_sample_is_of_the_table_of_names_and_has_its_labels(pages: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(poison="page row 7 ", rules=[{"match": "", "status": 429, "times": 1}])
    pages.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => 1000000)")
    drain(pages)
    pages.execute("SELECT embedline.resume_model('stub')")
    drain(pages)
    found = samples_of(pages)
    for name, labels in found:
        assert {label for label, _ in labels} <= set(BY_NAME[name].labels), name
    assert {name for name, _ in found} >= {
        "alert",
        "request_failures_total",
        "dead_letters",
        "budget_remaining",
        "money_total",
    }
    for metric in BY_NAME.values():
        assert re.fullmatch(r"[a-z_]+", metric.name), metric.name
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent)$", metric.name), metric.name


def test_counters_are_those_of_the_batches_and_survive_their_move_into_sums(pages: psycopg.Connection) -> None:
    drain(pages)
    insert_rows(pages, 31, 40)
    drain(pages)
    version = {"pipeline": "page", "version": "1"}
    first = samples_of(pages)
    assert value(first, "rows_total", **version) == value(first, "rows_embedded_total", **version) == 40
    assert value(first, "chunks_total", **version) == 40
    assert value(first, "requests_total", **version) == 2
    assert value(first, "tokens_total", **version) == scalar(pages, "SELECT sum(tokens) FROM embedline.batch")
    assert value(first, "money_total", pipeline="page", model="stub") == scalar(
        pages, "SELECT sum(money) FROM embedline.usage WHERE pipeline = 'page'"
    )
    for stage in ("claim", "read", "chunk", "embed", "write"):
        milliseconds = float(str(scalar(pages, f"SELECT sum({stage}_ms) FROM embedline.finished_batch")))
        assert value(first, "stage_seconds_total", stage=stage, **version) == pytest.approx(milliseconds / 1000)
    pages.execute("SELECT embedline.configure('batch_retention_hours', 0)")
    pages.execute("CALL embedline.run_nightly(repair => false)")
    pages.execute("SELECT embedline.configure('batch_retention_hours')")
    assert scalar(pages, "SELECT count(*) FROM embedline.batch") == 0
    later = samples_of(pages)
    for name in BY_NAME:
        if name.endswith("_total") and name not in ("stage_seconds_total", "request_failures_total", "money_total"):
            assert value(later, name, **version) == value(first, name, **version), name


def test_failures_are_counted_by_class_with_429_and_5xx_apart(pages: psycopg.Connection, stub: StubProvider) -> None:
    drain(pages)
    # After a 429 the session sends nothing for a while.
    for status, first in ((503, 31), (429, 41)):
        stub.behave(rules=[{"match": "", "status": status, "times": 1}])
        insert_rows(pages, first, first + 4)
        drain(pages)
        pages.execute("SELECT embedline.resume_model('stub')")
    found = samples_of(pages)
    version = {"pipeline": "page", "version": "1"}
    assert value(found, "request_failures_total", **version, **{"class": "rate_limited"}) == 1
    assert value(found, "request_failures_total", **version, **{"class": "server_error"}) == 1


def test_the_state_of_the_queue_follows_the_work(pages: psycopg.Connection) -> None:
    pages.execute("ANALYZE page")
    before = samples_of(pages)
    assert value(before, "coverage_rows_ratio", pipeline="page") < 0.1
    assert value(before, "backfill_ratio", pipeline="page") == 0
    drain(pages)
    insert_rows(pages, 31, 33)
    waiting = samples_of(pages)
    assert value(waiting, "pending_rows", pipeline="page") == 3
    assert value(waiting, "oldest_pending_age_seconds", pipeline="page") > 0
    assert 0.8 < value(waiting, "coverage_rows_ratio", pipeline="page") < 1
    drain(pages)
    after = samples_of(pages)
    assert (
        value(after, "pending_rows", pipeline="page")
        == value(after, "oldest_pending_age_seconds", pipeline="page")
        == 0
    )
    assert value(after, "coverage_rows_ratio", pipeline="page") == 1
    assert value(after, "coverage_chunks_ratio", pipeline="page", version="1") == 1
    assert 0 < value(after, "indexing_lag_seconds", pipeline="page") < 60


def test_a_long_queue_is_estimated_and_a_short_one_counted(pages: psycopg.Connection) -> None:
    drain(pages)
    pages.execute(f"INSERT INTO {PAGE('inbox')} (key_id) SELECT ARRAY[g] FROM generate_series(1, 9000) AS g")
    assert value(samples_of(pages), "pending_rows", pipeline="page") == 9000
    pages.execute(f"INSERT INTO {PAGE('inbox')} (key_id) SELECT ARRAY[g] FROM generate_series(1, 51000) AS g")
    # Rows at the front that are gone, and the pages that vacuum has emptied of them, do not count.
    pages.execute(f"DELETE FROM {PAGE('inbox')} WHERE key_id[1] <= 9000")
    pages.execute(f"VACUUM {PAGE('inbox')}")
    assert value(samples_of(pages), "pending_rows", pipeline="page") == pytest.approx(42_000, rel=0.02)
    pages.execute(f"TRUNCATE {PAGE('inbox')}")


def test_a_new_version_has_its_own_coverage(pages: psycopg.Connection, stub: StubProvider) -> None:
    drain(pages)
    # Else the statistics count the rows twice: by ANALYZE, and by this session once it sends its own counts.
    pages.execute("SELECT pg_stat_force_next_flush()")
    pages.execute(f"ANALYZE {PAGE('chunk')}")
    create_stub_model(pages, stub, "other", document_prefix="other: ")
    pages.execute("SELECT embedline.add_embedding_version('page', 'other')")
    pages.execute("SELECT embedline.embed_pending(10)")
    found = samples_of(pages)
    assert value(found, "version_info", pipeline="page", version="2", model="other", serving="false") == 1
    assert 0.2 < value(found, "coverage_chunks_ratio", pipeline="page", version="2") < 0.4
    assert value(found, "coverage_chunks_ratio", pipeline="page", version="1") == 1


def test_alerts_are_gauges_and_a_scrape_notes_since_when(pages: psycopg.Connection, connect: Connect) -> None:
    drain(pages)
    pages.execute("SELECT embedline.pause_pipeline('page')")
    insert_rows(pages, 31, 33)
    labels = {"alert": "paused", "severity": "note", "subject": "page"}
    assert value(samples_of(_fresh(pages)), "alert", **labels) == 1
    since = scalar(pages, "SELECT since FROM embedline.alert_state WHERE alert = 'paused'")
    assert value(samples_of(_fresh(pages)), "alert", **labels) == 1
    assert scalar(pages, "SELECT since FROM embedline.alert WHERE alert = 'paused'") == since
    pages.execute("SELECT embedline.resume_pipeline('page')")
    drain(pages)
    assert ("alert", frozenset(labels.items())) not in samples_of(_fresh(pages))
    assert scalar(pages, "SELECT count(*) FROM embedline.alert_state WHERE alert = 'paused'") == 0


def _fresh(connection: psycopg.Connection) -> psycopg.Connection:
    """Forget the alerts that the session has read, as it does after a while."""
    connection.execute("DO LANGUAGE plpython3u $$GD.pop('embedline.alerts', None)$$")
    return connection


def test_a_session_that_may_not_write_gets_them_too(pages: psycopg.Connection) -> None:
    _fresh(pages)
    with pages.transaction():
        pages.execute("SET TRANSACTION READ ONLY")
        assert value(samples_of(pages), "up") == 1


def test_a_reader_may_scrape_and_sees_no_text_and_no_key(
    pages: psycopg.Connection, make_role: MakeRole, stub: StubProvider
) -> None:
    stub.behave(poison="page row 7 ")
    drain(pages)
    assert scalar(_fresh(pages), "SELECT count(*) FROM embedline.dead_letter") == 1
    role = make_role("embedline_reader")
    with pages.transaction():
        pages.execute(f"SET LOCAL ROLE {role}")
        text = str(scalar(pages, "SELECT embedline.metrics()"))
    assert "dead_letters" in text
    assert "page row" not in text


def test_labels_are_escaped() -> None:
    from embedline.observe.metrics import format_labels

    assert format_labels([("a", 'x"y\\z\n'), ("b", None), ("c", 1)]) == '{a="x\\"y\\\\z\\n",c="1"}'


def test_the_memory_of_a_model_host_is_shown(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    database.execute("INSERT INTO page VALUES (1, 'a row')")
    database.execute("SELECT embedline.create_pipeline('page', 'page', 'body', 'static-256', index_method => 'none')")
    drain(database)
    # numpy and a model take this much at least.
    assert value(samples_of(database), "model_host_resident_bytes", model="static-256") > 20_000_000


def test_the_reference_lists_each_metric() -> None:
    from embedline.dev import metric_index

    assert metric_index.PAGE.read_text(encoding="utf-8") == metric_index.render(), "run: make golden"
