"""The dashboard for Grafana: its script, and what Prometheus answers to it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import promql_parser
import psycopg
import pytest

from embedline.observe.metric_names import BY_NAME
from monitors import prometheus, serving
from stub_provider import StubProvider
from support import ROOT, wait_until
from working import create_stub_model, create_stub_pipeline, dsn_of, working

SCRIPT = ROOT / "ops" / "grafana" / "make_dashboard.py"
# Series that a healthy pipeline with one version and no index does not have.
_ABSENT = re.compile(r"index_bytes|index_build|reach_recall|budget|failures|money|backfill_ratio.* < 1")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dashboard", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _queries() -> list[str]:
    """Return the queries of the file, with a value for each of Grafana's variables."""
    panels: list[dict[str, Any]] = json.loads(SCRIPT.with_name("dashboard.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [query.replace("$__rate_interval", "1m").replace("$pipeline", ".*") for query in found]


def _metrics_of(query: str) -> set[str]:
    return set(re.findall(r"embedline_(\w+)", query))


def test_the_file_is_what_the_script_writes() -> None:
    assert SCRIPT.with_name("dashboard.json").read_text() == _script().build(), f"run: .venv/bin/python {SCRIPT.name}"


def test_each_query_is_of_metrics_that_there_are() -> None:
    queries = _queries()
    assert len(queries) >= 25
    for query in queries:
        promql_parser.parse(query)
        assert _metrics_of(query) <= set(BY_NAME), query
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        promql_parser.parse("sum by (")


@pytest.mark.faults
def test_prometheus_answers_each_query(stub_database: psycopg.Connection, stub: StubProvider, tmp_path: Path) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=30)
    with serving(dsn_of(stub_database), tmp_path) as (url, _), prometheus(urlsplit(url).netloc, tmp_path) as monitor:
        wait_until(lambda: monitor.value("embedline_backfill_ratio") == 0, 30, "the metrics are scraped")
        rate = 'sum(rate(embedline_rows_total{pipeline="page"}[1m]))'
        with working(stub_database):
            wait_until(lambda: monitor.value(rate) is not None, 60, "there are two samples of the rows")
            wait_until(lambda: monitor.value("embedline_worker_commit_seconds") is not None, 60, "the worker reports")
            for query in _queries():
                assert monitor.query(query) or _ABSENT.search(query), query
