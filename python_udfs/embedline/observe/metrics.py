"""Write the metrics of a database as text that Prometheus reads.

A scrape is to take under 50 ms with 1,000,000 rows that wait, and under 300 ms with 1,000 pipelines. So nothing is counted
whose cost grows with a table; `metric_names` says what is estimated.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import embedline
from embedline.observe import model_hosts
from embedline.observe.metric_names import BY_NAME, METRICS, PREFIX
from embedline.observe.metric_queries import ALERTS, NOTE_ALERTS, QUERIES
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import ALERTS_LOCK
from embedline.postgres.session import Session

# Evaluating alerts takes 10 ms, and 0.4 s with 1,000 pipelines. A session evaluates them again after this many times as
# long, and after these seconds at the latest. Alerts are to be seen within a minute.
_ALERT_REST, _ALERT_SECONDS = 50, 30.0
_CACHE_KEY = "embedline.alerts"
# Alerts whose subject has numbers in it, which would make a new series of each.
_OF_SERVER = ("workers_slowed",)
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_HEADS = {
    metric.name: f"# HELP {PREFIX}{metric.name} {metric.help}\n# TYPE {PREFIX}{metric.name} {metric.kind}"
    for metric in METRICS
}


class _Samples:
    """The lines of each metric."""

    def __init__(self) -> None:
        self._lines: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, name: str, labels: str, value: Any) -> None:
        """Add a sample; None adds nothing."""
        if value is not None:
            self._lines[name].append(f"{PREFIX}{name}{labels} {value}")

    def add_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of a query; `metric_queries` tells what its columns mean."""
        if not rows:
            return
        columns = [_Column(name, self._lines) for name in rows[0] if name.partition(".")[0] in BY_NAME]
        values = {column.name for column in columns}
        names = [name for name in rows[0] if name not in values]
        # 1,000 pipelines have 25,000 samples, so a line is put together of as few pieces as possible.
        for row in rows:
            labels = format_labels([(name, row[name]) for name in names])
            for column in columns:
                value = row[column.name]
                if value is not None:
                    shown = f"{labels[:-1]}{column.label}" if column.label else labels
                    column.lines.append(f"{column.metric}{shown} {value}")

    def text(self) -> str:
        """Return all samples, each metric's under its HELP and TYPE."""
        parts = [line for name, head in _HEADS.items() if self._lines[name] for line in (head, *self._lines[name])]
        return "\n".join([*parts, ""])


class _Column:
    """A column of values: its metric, and the end of all its labels."""

    def __init__(self, name: str, lines: Mapping[str, list[str]]) -> None:
        metric, _, value = name.partition(".")
        self.name = name
        self.metric = PREFIX + metric
        self.lines = lines[metric]
        self.label = f',{BY_NAME[metric].labels[-1]}="{value}"}}' if value else ""


@entry_point
def metrics(session: Session) -> str:
    """Return the metrics of this database in Prometheus' text format."""
    started = time.perf_counter()
    samples = _Samples()
    samples.add("up", "", 1)
    samples.add("info", format_labels([("version", embedline.__version__), *_versions(session)]), 1)
    for (alert, severity, subject), value in _alerts(session).items():
        samples.add("alert", format_labels([("alert", alert), ("severity", severity), ("subject", subject)]), value)
    for query in QUERIES:
        samples.add_rows(session.query(query))
    for model, resident in model_hosts.resident_bytes(session):
        samples.add("model_host_resident_bytes", format_labels([("model", model)]), resident)
    samples.add("scrape_seconds", "", round(time.perf_counter() - started, 6))
    return samples.text()


def format_labels(labels: Iterable[tuple[str, Any]]) -> str:
    """Return labels in braces, without those that have no value."""
    given = [f'{name}="{_escaped(value)}"' for name, value in labels if value is not None]
    return "{" + ",".join(given) + "}" if given else ""


def _escaped(value: Any) -> str:
    text = str(value)
    return text.translate(_ESCAPES) if '"' in text or "\\" in text or "\n" in text else text


def _versions(session: Session) -> list[tuple[str, str]]:
    row = session.query(
        "SELECT current_setting('server_version') AS postgresql,"
        " (SELECT e.extversion FROM pg_extension AS e WHERE e.extname = 'vector') AS pgvector"
    )[0]
    return [("postgresql", str(row["postgresql"]).partition(" ")[0]), ("pgvector", str(row["pgvector"]))]


def _alerts(session: Session) -> dict[tuple[str, str, str], int]:
    """Return what is wrong, and note since when, as workers do.

    A server that accepts no writes, such as a standby, only shows it.
    """
    found, due_at = session.cache.get(_CACHE_KEY, ({}, 0.0))
    started = time.monotonic()
    if started < due_at:
        return dict(found)
    notes = session.scalar("SELECT current_setting('transaction_read_only') = 'off'") and session.scalar(
        "SELECT pg_try_advisory_xact_lock($1)", ["bigint"], ALERTS_LOCK
    )
    rows = session.query(ALERTS)
    if notes:
        columns = [[row[name] for row in rows] for name in ("alert", "subject", "since")]
        session.query(NOTE_ALERTS, ["text[]", "text[]", "timestamptz[]"], *columns)
    found = {
        (row["alert"], row["severity"], "server" if row["alert"] in _OF_SERVER else row["subject"]): 1 for row in rows
    }
    seconds = time.monotonic() - started
    session.cache[_CACHE_KEY] = (found, started + min(_ALERT_REST * seconds, _ALERT_SECONDS))
    return found
