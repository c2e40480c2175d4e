"""Name each metric with its type, its labels and its help, in one table.

The names follow OpenMetrics: base units, `_total` for counters. Labels have a bounded number of values: names of pipelines,
models and indexes, never a key, a text or a tenant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "embedline_"


@dataclass(frozen=True)
class Metric:
    """A metric without its prefix; `help` is one sentence."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


_VERSION = ("pipeline", "version")
_BUDGET = ("pipeline", "model", "period", "unit")

METRICS: tuple[Metric, ...] = (
    Metric("up", "gauge", "1 if the database answered the scrape, 0 if it was away."),
    Metric("info", "gauge", "Versions of what runs here; the value is 1.", ("version", "postgresql", "pgvector")),
    Metric("scrape_seconds", "gauge", "Seconds that this answer took in the server."),
    # What wrong is now.
    Metric(
        "alert",
        "gauge",
        "1 for each row of embedline.alert; read again after 50 times the time that it takes, 30 s at most.",
        ("alert", "severity", "subject"),
    ),
    # The queue of a pipeline.
    Metric("pipeline_paused", "gauge", "1 if the pipeline is paused.", ("pipeline",)),
    Metric(
        "pending_rows",
        "gauge",
        "Changes that wait or are in flight. Above 10,000 an estimate by the size of the queue's tables.",
        ("pipeline",),
    ),
    Metric(
        "oldest_pending_age_seconds",
        "gauge",
        "Age of the oldest change that waits or is in flight; 0 if none does.",
        ("pipeline",),
    ),
    Metric(
        "indexing_lag_seconds",
        "gauge",
        "From commit to searchable: the longest lag of the last minute's batches, or the oldest pending age if larger.",
        ("pipeline",),
    ),
    Metric("source_rows", "gauge", "Rows of the source, by the server's statistics.", ("pipeline",)),
    Metric("backfill_ratio", "gauge", "Share of the source that the backfill has read, from 0 to 1.", ("pipeline",)),
    Metric(
        "coverage_rows_ratio",
        "gauge",
        "Share of source rows whose current text is embedded, from 0 to 1; estimated with source_rows and pending_rows.",
        ("pipeline",),
    ),
    Metric("dead_letters", "gauge", "Rows that were given up and wait for a decision.", ("pipeline",)),
    Metric(
        "unrepaired_findings",
        "gauge",
        "Findings of the last embedline.verify that it did not repair.",
        ("pipeline", "finding"),
    ),
    Metric("verified_timestamp_seconds", "gauge", "Unix time of the last embedline.verify.", ("pipeline",)),
    # Versions.
    Metric(
        "version_info",
        "gauge",
        "The model of each version and whether it serves; the value is 1.",
        ("pipeline", "version", "model", "serving"),
    ),
    Metric("vectors", "gauge", "Vectors of the version, by the server's statistics.", _VERSION),
    Metric("dead_tuples", "gauge", "Dead rows in the version's table, by the server's statistics.", _VERSION),
    Metric(
        "coverage_chunks_ratio",
        "gauge",
        "Share of chunks that have a vector of this version, from 0 to 1; estimated by the server's statistics.",
        _VERSION,
    ),
    Metric("version_dead_letters", "gauge", "Chunks that the version gave up and that are not accepted.", _VERSION),
    Metric("ef_search", "gauge", "hnsw.ef_search that searches use, as measured.", _VERSION),
    Metric("probes", "gauge", "ivfflat.probes that searches use, as measured.", _VERSION),
    Metric("reach_recall_ratio", "gauge", "Lowest measured recall@10 of the index, from 0 to 1.", _VERSION),
    Metric("index_bytes", "gauge", "Bytes of a valid vector index.", ("pipeline", "version", "index")),
    Metric("index_build_ratio", "gauge", "Progress of a phase of a build, 0 to 1.", ("pipeline", "version", "index")),
    # Derived vectors.
    Metric(
        "derived_pending_subjects",
        "gauge",
        "Subjects of derived vectors that wait to be computed; one that is queued twice counts twice.",
        ("derived",),
    ),
    Metric(
        "derived_oldest_pending_age_seconds",
        "gauge",
        "Age of the oldest change that derived vectors do not have yet; 0 if there is none.",
        ("derived",),
    ),
    # The work, of all batches ever.
    Metric("batches_total", "counter", "Batches that are through.", _VERSION),
    Metric("rows_total", "counter", "Rows of these batches; of a fill, chunks.", _VERSION),
    Metric("rows_embedded_total", "counter", "Rows that were embedded; of a fill, chunks.", _VERSION),
    Metric("rows_retried_total", "counter", "Rows that had been tried before.", _VERSION),
    Metric("rows_dead_total", "counter", "Rows that were given up.", _VERSION),
    Metric("chunks_total", "counter", "Chunks that were written.", _VERSION),
    Metric("requests_total", "counter", "Requests that were sent to the model.", _VERSION),
    Metric("tokens_total", "counter", "Tokens, as the provider counted them or as estimated.", _VERSION),
    Metric("content_bytes_total", "counter", "Bytes of the texts.", _VERSION),
    Metric(
        "stage_seconds_total",
        "counter",
        "Seconds of each stage: claim, read, chunk, embed, write.",
        (*_VERSION, "stage"),
    ),
    Metric(
        "request_failures_total",
        "counter",
        "Failed requests: rate_limited (429), server_error (5xx), unreachable, rejected, refused, invalid_answer or other.",
        (*_VERSION, "class"),
    ),
    # Models.
    Metric("circuit_open", "gauge", "1 if the model's circuit breaker is open: it rests.", ("model",)),
    Metric("circuit_failures", "gauge", "Failures in a row that the circuit breaker counts.", ("model",)),
    Metric(
        "model_host_resident_bytes",
        "gauge",
        "Resident memory of the process that runs a local model, or asks the providers of remote ones.",
        ("model",),
    ),
    # Money.
    Metric(
        "money_total",
        "counter",
        "Money of this UTC day, in the currency of the model's price; it begins at 0 with each day.",
        ("pipeline", "model"),
    ),
    Metric("budget_amount", "gauge", "The budget of a pipeline or a model, in its unit.", _BUDGET),
    Metric("budget_remaining", "gauge", "What is left of it; below 0 if more was counted than estimated.", _BUDGET),
    # Workers and the machine.
    Metric("workers_alive", "gauge", "Resident workers of this database."),
    Metric("workers_scheduled", "gauge", "Workers that pg_cron is to run."),
    Metric("worker_batch_rows", "gauge", "Most rows that a worker claims at a time now."),
    Metric("worker_requests_in_flight", "gauge", "Requests that all workers have in flight."),
    Metric("worker_commit_seconds", "gauge", "The longest last commit of a write among the workers."),
    Metric("worker_held_back", "gauge", "1 if a worker slows down for a replica that lags or an old snapshot."),
    Metric("memory_bytes", "gauge", "Memory of the server's machine or container."),
    Metric("disk_bytes", "gauge", "Size of the data directory's disk."),
    Metric("disk_free_bytes", "gauge", "Free bytes of the data directory's disk."),
)
BY_NAME = {metric.name: metric for metric in METRICS}
