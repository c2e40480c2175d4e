"""What Prometheus and Alertmanager make of the metrics and of the rules in ops/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from monitors import RULES, Prometheus, alertmanager, prometheus, promtool, receiver, serving
from stub_provider import StubProvider
from support import ROOT, drain, scalar, wait_until
from working import create_stub_model, create_stub_pipeline, dsn_of, insert_rows


@pytest.fixture
def pages(stub_database: psycopg.Connection, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """A pipeline on the stub with 30 rows, all embedded."""
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=30)
    drain(stub_database)
    yield stub_database


def _alert_names() -> set[str]:
    """Return the names of the alerts in the sources of the view."""
    text = "".join(path.read_text() for path in (ROOT / "sql" / "functions").glob("_*_alerts.sql"))
    named = set(re.findall(r"(?:critical|warning|note)'(?: END)?,\s+'(\w+)',", text))
    return named | {"model_changed", "vectors_unreachable", "unrepaired"}


def test_promtool_finds_nothing_to_say_about_the_metrics(pages: psycopg.Connection) -> None:
    text = str(scalar(pages, "SELECT embedline.metrics()"))
    done = promtool("check", "metrics", text=text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert promtool("check", "metrics", text=text.replace("rows_total", "rows")).returncode != 0


def test_the_rules_fire_as_their_tests_say() -> None:
    done = promtool("test", "rules", str(RULES.with_name("alerts_test.yml")))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_of_the_view_has_a_rule() -> None:
    ruled = set(re.findall(r'embedline_alert\{alert="(\w+)"\}', RULES.read_text()))
    assert ruled == _alert_names()


@pytest.mark.faults
def test_an_alert_reaches_a_webhook_and_is_resolved_after_the_mend(pages: psycopg.Connection, tmp_path: Path) -> None:
    with (
        receiver() as (webhook, received),
        alertmanager(webhook, tmp_path) as port,
        serving(dsn_of(pages), tmp_path) as (url, _),
        prometheus(urlsplit(url).netloc, tmp_path, port) as monitor,
    ):
        wait_until(lambda: monitor.value("embedline_up") == 1, 30, "the metrics are scraped")
        assert monitor.value('embedline_rows_total{pipeline="page"}') == 30
        assert monitor.value('sum(embedline_stage_seconds_total{pipeline="page"}) > bool 0') == 1
        pages.execute("SELECT embedline.pause_pipeline('page')")
        insert_rows(pages, 31, 33)
        wait_until(lambda: _states(received, "EmbedlinePaused"), 60, "the alert arrives")
        assert _states(received, "EmbedlinePaused")[0] == ("firing", "note", "page")
        pages.execute("SELECT embedline.resume_pipeline('page')")
        drain(pages)
        resolved = ("resolved", "note", "page")
        wait_until(lambda: resolved in _states(received, "EmbedlinePaused"), 60, "the alert is resolved")
        assert b"page row" not in b"".join(body for _, body in received)


@pytest.mark.faults
def test_a_server_that_is_away_is_seen(pages: psycopg.Connection, tmp_path: Path) -> None:
    with serving(dsn_of(pages), tmp_path) as (url, _), prometheus(urlsplit(url).netloc, tmp_path) as monitor:
        wait_until(lambda: monitor.value("embedline_up") == 1, 30, "the metrics are scraped")
        pages.execute("ALTER FUNCTION embedline.metrics() RENAME TO other_metrics")
        try:
            wait_until(lambda: _is_down(monitor), 30, "the scrape fails")
        finally:
            pages.execute("ALTER FUNCTION embedline.other_metrics() RENAME TO metrics")
        wait_until(lambda: monitor.value("embedline_up") == 1, 30, "the metrics are scraped again")


def _is_down(monitor: Prometheus) -> bool:
    return monitor.value('up{job="embedline"}') == 0 and bool(monitor.query('ALERTS{alertname="EmbedlineDown"}'))


def _states(received: list[tuple[str, bytes]], name: str) -> list[tuple[str, str, str]]:
    """Return state, severity and subject of each alert of a name, as it was received."""
    alerts: list[dict[str, Any]] = [alert for _, body in received for alert in json.loads(body)["alerts"]]
    return [
        (alert["status"], alert["labels"]["severity"], alert["labels"]["subject"])
        for alert in alerts
        if alert["labels"]["alertname"] == name
    ]
