"""Write ops/grafana/dashboard.json.

A test says whether the file is current, and runs each query on a Prometheus.
"""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh

FILE = Path(__file__).with_name("dashboard.json")
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_PIPELINE = 'pipeline=~"$pipeline"'


def _rate(metric: str, label: str) -> str:
    """Return the query of a counter's rate, summed up by one label."""
    return f"sum by ({label}) (rate(embedline_{metric}{{{_PIPELINE}}}[$__rate_interval]))"


# The panels of each row: title, unit, and the queries with their legends.
_ROWS: dict[str, list[tuple[str, str, list[tuple[str, str]]]]] = {
    "Freshness": [
        ("Changes that wait", "short", [(f"embedline_pending_rows{{{_PIPELINE}}}", "{{pipeline}}")]),
        ("Indexing lag", "s", [(f"embedline_indexing_lag_seconds{{{_PIPELINE}}}", "{{pipeline}}")]),
        ("Rows covered", "percentunit", [(f"embedline_coverage_rows_ratio{{{_PIPELINE}}}", "{{pipeline}}")]),
        (
            "Chunks covered by version",
            "percentunit",
            [(f"embedline_coverage_chunks_ratio{{{_PIPELINE}}}", "{{pipeline}} v{{version}}")],
        ),
        ("Dead letters", "short", [(f"embedline_dead_letters{{{_PIPELINE}}}", "{{pipeline}}")]),
        ("Backfill", "percentunit", [(f"embedline_backfill_ratio{{{_PIPELINE}}} < 1", "{{pipeline}}")]),
    ],
    "Work": [
        (
            "Rows embedded",
            "rowsps",
            [(_rate("rows_embedded_total", "pipeline"), "{{pipeline}}")],
        ),
        (
            "Tokens",
            "short",
            [(_rate("tokens_total", "pipeline"), "{{pipeline}}")],
        ),
        (
            "Seconds of each stage in a second",
            "s",
            [(_rate("stage_seconds_total", "stage"), "{{stage}}")],
        ),
        (
            "Rows in a batch",
            "short",
            [
                (
                    f"{_rate('rows_total', 'pipeline')} / {_rate('batches_total', 'pipeline')}",
                    "{{pipeline}}",
                )
            ],
        ),
        (
            "Rows tried again",
            "rowsps",
            [(_rate("rows_retried_total", "pipeline"), "{{pipeline}}")],
        ),
        (
            "Workers",
            "short",
            [
                ("embedline_workers_alive", "alive"),
                ("embedline_workers_scheduled", "scheduled"),
                ("embedline_worker_requests_in_flight", "requests in flight"),
            ],
        ),
    ],
    "Models": [
        (
            "Requests",
            "reqps",
            [(_rate("requests_total", "pipeline"), "{{pipeline}}")],
        ),
        (
            "Failed requests",
            "reqps",
            [(_rate("request_failures_total", "class"), "{{class}}")],
        ),
        ("Circuit breakers that are open", "short", [("embedline_circuit_open", "{{model}}")]),
        (
            "Money of the day",
            "short",
            [(f"sum by (pipeline, model) (embedline_money_total{{{_PIPELINE}}})", "{{pipeline}} {{model}}")],
        ),
        (
            "Budget left",
            "percentunit",
            [("embedline_budget_remaining / embedline_budget_amount", "{{pipeline}}{{model}} {{unit}} a {{period}}")],
        ),
        ("Memory of model hosts", "bytes", [("embedline_model_host_resident_bytes", "{{model}}")]),
    ],
    "Indexes and server": [
        (
            "Indexes against memory",
            "percentunit",
            [("sum(embedline_index_bytes) / max(embedline_memory_bytes)", "all indexes")],
        ),
        ("Index sizes", "bytes", [(f"embedline_index_bytes{{{_PIPELINE}}}", "{{index}}")]),
        ("Index builds", "percentunit", [(f"embedline_index_build_ratio{{{_PIPELINE}}}", "{{index}}")]),
        (
            "Recall of indexes",
            "percentunit",
            [(f"embedline_reach_recall_ratio{{{_PIPELINE}}}", "{{pipeline}} v{{version}}")],
        ),
        (
            "Dead rows in version tables",
            "percentunit",
            [
                (
                    f"embedline_dead_tuples{{{_PIPELINE}}} / (embedline_dead_tuples{{{_PIPELINE}}}"
                    f" + embedline_vectors{{{_PIPELINE}}})",
                    "{{pipeline}} v{{version}}",
                )
            ],
        ),
        (
            "Free disk, last commit",
            "short",
            [
                ("embedline_disk_free_bytes / embedline_disk_bytes", "free share of the disk"),
                ("embedline_worker_commit_seconds", "seconds of the last commit"),
            ],
        ),
    ],
}
_STATS = [
    ("Alerts", "short", 'count(embedline_alert{severity=~"critical|warning"}) or vector(0)'),
    ("Changes that wait", "short", "sum(embedline_pending_rows)"),
    ("Oldest change", "s", "max(embedline_oldest_pending_age_seconds)"),
    ("Workers alive", "short", "max(embedline_workers_alive)"),
]


def build() -> str:
    """Return the dashboard as JSON."""
    found = (
        dashboard.Dashboard("Embedline")
        .uid("embedline")
        .tags(["embedline", "postgresql"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("pipeline")
            .label("Pipeline")
            .datasource(_SOURCE)
            .query("label_values(embedline_pending_rows, pipeline)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
        )
    )
    for title, unit, expression in _STATS:
        panel = stat.Panel().title(title).unit(unit).datasource(_SOURCE).height(4).span(6)
        found = found.with_panel(panel.with_target(_query(expression, "")))
    for row, panels in _ROWS.items():
        found = found.with_row(dashboard.Row(row))
        for title, unit, queries in panels:
            series = timeseries.Panel().title(title).unit(unit).min(0).datasource(_SOURCE).height(8).span(8)
            for number, (expression, legend) in enumerate(queries):
                series = series.with_target(_query(expression, legend, number))
            found = found.with_panel(series)
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(found.build())), indent=2, sort_keys=True) + "\n"


def _query(expression: str, legend: str, number: int = 0) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend or "__auto").ref_id(chr(ord("A") + number))


if __name__ == "__main__":
    FILE.write_text(build(), encoding="utf-8")
