"""Hold the queries of the metrics.

A column named as a metric of `metric_names` is its value. "metric.value" also gives the value of the metric's last label.
Every other column is a label. Nothing is read from a table whose
rows grow with the data, except the first rows of a queue; sizes come from the server's statistics.
"""

from __future__ import annotations

from embedline.worker.meter import Stage

ALERTS = """
    SELECT c.alert, c.severity, c.subject, c.since::text AS since FROM embedline._alert_conditions() AS c
    ORDER BY c.alert, c.subject
"""
# As embedline._note_alerts(), of alerts that were read in this transaction, under the same lock.
NOTE_ALERTS = """
    WITH found AS (
        SELECT f.alert, f.subject, coalesce(min(f.since), clock_timestamp()) AS since
        FROM unnest($1, $2, $3) AS f (alert, subject, since) GROUP BY f.alert, f.subject
    ),
    ended AS (
        DELETE FROM embedline.alert_state AS s
        WHERE NOT EXISTS (SELECT FROM found AS f WHERE f.alert = s.alert AND f.subject = s.subject)
    )
    INSERT INTO embedline.alert_state (alert, subject, since) SELECT f.alert, f.subject, f.since FROM found AS f
    ON CONFLICT (alert, subject) DO NOTHING
"""
# Rows of a table by the server's statistics: the current count, or that of the last ANALYZE on a standby.
_ROWS = """coalesce(nullif(pg_stat_get_live_tuples({0}), 0), (
                SELECT greatest(g.reltuples, 0)::bigint FROM pg_class AS g WHERE g.oid = {0}
            ), 0)"""
# The oid of a generated table. A join with pg_class would read all of it: 50,000 rows with 1,000 pipelines.
_TABLE = "CROSS JOIN LATERAL (SELECT to_regclass(format('embedline_data.%I', {0}))::oid AS oid OFFSET 0) AS {1}"
# A share that is 1 if nothing is missing, and below 1 otherwise.
_SHARE = "CASE WHEN {0} <= 0 THEN 1 WHEN {1} > 0 THEN greatest(1 - {0}::float8 / greatest({1}, {0}), 0) ELSE 0 END"

_PIPELINES = f"""
    WITH ranges AS MATERIALIZED (
        SELECT r.pipeline_id, sum(r.blocks) AS total, sum(greatest(r.blocks, 1)) FILTER (WHERE NOT r.done) AS open
        FROM (
            SELECT b.pipeline_id, b.done, (b.end_tid::text::point)[0] - (b.next_tid::text::point)[0] AS blocks
            FROM embedline.backfill_range AS b
        ) AS r GROUP BY r.pipeline_id
    ),
    dead AS MATERIALIZED (SELECT d.pipeline_id, count(*) AS n FROM embedline.dead_letter AS d GROUP BY d.pipeline_id),
    recent AS MATERIALIZED (
        SELECT b.pipeline_id, max(b.lag_seconds) AS lag FROM embedline.finished_batch AS b
        WHERE b.finished_at > clock_timestamp() - interval '60 seconds' GROUP BY b.pipeline_id
    ),
    verified AS MATERIALIZED (
        SELECT o.pipeline_id, extract(epoch FROM max(o.verified_at))::float8 AS at FROM embedline.verification AS o
        GROUP BY o.pipeline_id
    ),
    counted AS (
        SELECT p.pipeline_id, p.name, p.state = 'paused' AS is_paused, c.pending,
            greatest(extract(epoch FROM clock_timestamp() - c.oldest_enqueued_at)::float8, 0) AS age,
            coalesce(d.n, 0) AS dead, n.lag, o.at, {_ROWS.format("p.source")} AS rows,
            CASE WHEN v.state = 'complete' THEN 1
                ELSE coalesce(least(greatest(r.total - r.open, 0) / nullif(r.total, 0), 0.999), 0) END AS read
        FROM embedline.pipeline AS p
        INNER JOIN embedline.version AS v ON v.version_id = p.serving_version_id
        LEFT JOIN ranges AS r ON r.pipeline_id = p.pipeline_id
        LEFT JOIN dead AS d ON d.pipeline_id = p.pipeline_id
        LEFT JOIN recent AS n ON n.pipeline_id = p.pipeline_id
        LEFT JOIN verified AS o ON o.pipeline_id = p.pipeline_id
        CROSS JOIN LATERAL embedline._pipeline_counts(p.name) AS c
    )
    SELECT k.name AS pipeline, k.is_paused::int AS pipeline_paused, k.pending AS pending_rows,
        coalesce(round(k.age::numeric, 3)::float8, 0) AS oldest_pending_age_seconds,
        round(greatest(k.age, k.lag, 0)::numeric, 3)::float8 AS indexing_lag_seconds, k.rows AS source_rows,
        k.read AS backfill_ratio, k.dead AS dead_letters, k.at AS verified_timestamp_seconds,
        {_SHARE.format("(k.pending + k.dead + k.rows * (1 - k.read) + (k.read < 1)::int)", "k.rows")} AS coverage_rows_ratio
    FROM counted AS k ORDER BY k.name
"""
_FINDINGS = """
    SELECT l.pipeline, f.value ->> 'name' AS finding,
        sum((f.value ->> 'count')::bigint - coalesce((f.value ->> 'repaired')::bigint, 0))::bigint AS unrepaired_findings
    FROM (
        SELECT DISTINCT ON (o.pipeline_id) p.name AS pipeline, o.findings FROM embedline.verification AS o
        INNER JOIN embedline.pipeline AS p ON p.pipeline_id = o.pipeline_id
        ORDER BY o.pipeline_id, o.verified_at DESC
    ) AS l CROSS JOIN LATERAL jsonb_array_elements(l.findings) AS f
    WHERE f.value ->> 'count' IS NOT NULL AND f.value ->> 'name' <> 'pending'
    GROUP BY 1, 2 ORDER BY 1, 2
"""
_VERSION_INFO = """
    SELECT p.name AS pipeline, v.number AS version, m.name AS model,
        CASE WHEN v.version_id = p.serving_version_id THEN 'true' ELSE 'false' END AS serving, 1 AS version_info
    FROM embedline.version AS v
    INNER JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
    INNER JOIN embedline.model AS m ON m.model_id = v.model_id ORDER BY 1, 2
"""
_VERSIONS = f"""
    WITH queued AS MATERIALIZED (
        SELECT q.version_id, sum(coalesce(cardinality(q.chunk_ids), q.end_id - q.first_id))::bigint AS n
        FROM embedline.version_queue AS q GROUP BY q.version_id
    ),
    dead AS MATERIALIZED (
        SELECT d.version_id, count(*) FILTER (WHERE d.accepted_by IS NULL) AS n FROM embedline.version_dead_letter AS d
        GROUP BY d.version_id
    ),
    counted AS (
        SELECT p.name, v.number, i.ef_search, i.probes, i.recall, {_ROWS.format("t.oid")} AS vectors,
            pg_stat_get_dead_tuples(t.oid) AS dead_tuples, {_ROWS.format("c.oid")} AS chunks, coalesce(d.n, 0) AS dead,
            coalesce(q.n, 0) + coalesce(d.n, 0) + (v.state <> 'complete')::int AS missing
        FROM embedline.version AS v
        INNER JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
        {_TABLE.format("p.name || '_v' || v.number", "t")}
        {_TABLE.format("p.name || CASE WHEN v.chunk_set = 1 THEN '_chunk' ELSE '_chunk_' || v.chunk_set END", "c")}
        LEFT JOIN queued AS q ON q.version_id = v.version_id
        LEFT JOIN dead AS d ON d.version_id = v.version_id
        LEFT JOIN embedline.index_reach AS i ON i.version_id = v.version_id
        WHERE t.oid IS NOT NULL
    )
    SELECT k.name AS pipeline, k.number AS version, k.vectors, k.dead_tuples, k.dead AS version_dead_letters, k.ef_search,
        k.probes, k.recall::float8 AS reach_recall_ratio, {_SHARE.format("k.missing", "k.chunks")} AS coverage_chunks_ratio
    FROM counted AS k ORDER BY k.name, k.number
"""
_INDEXES = """
    SELECT i.pipeline, i.version, i.name AS index, i.bytes AS index_bytes, i.percent / 100 AS index_build_ratio
    FROM embedline.index_progress() AS i WHERE i.bytes IS NOT NULL OR i.percent IS NOT NULL
"""
_SUMS = ("row", "embedded", "retried", "dead", "chunk", "request", "token")
_STAGES = tuple(Stage)
_MEASURED = [*(f"{name}_count" for name in _SUMS), "content_bytes", *(f"{stage}_ms" for stage in _STAGES)]
_DONE = f"""
    SELECT p.name AS pipeline, v.number AS version, s.batches_total, s.rows_total, s.rows_embedded_total,
        s.rows_retried_total, s.rows_dead_total, s.chunks_total, s.requests_total, s.tokens_total, s.content_bytes_total,
        {", ".join(f's.{stage}_seconds AS "stage_seconds_total.{stage}"' for stage in _STAGES)}
    FROM (
        SELECT b.pipeline_id, b.version_id, sum(b.batch_count)::bigint AS batches_total,
            sum(b.row_count)::bigint AS rows_total, sum(b.embedded_count)::bigint AS rows_embedded_total,
            sum(b.retried_count)::bigint AS rows_retried_total, sum(b.dead_count)::bigint AS rows_dead_total,
            sum(b.chunk_count)::bigint AS chunks_total, sum(b.request_count)::bigint AS requests_total,
            sum(b.token_count)::bigint AS tokens_total, sum(b.content_bytes)::bigint AS content_bytes_total,
            {", ".join(f"sum(b.{stage}_ms) / 1000 AS {stage}_seconds" for stage in _STAGES)}
        FROM (
            SELECT t.pipeline_id, t.version_id, t.batch_count, {", ".join(f"t.{name}" for name in _MEASURED)}
            FROM embedline.batch_total AS t
            UNION ALL
            SELECT f.pipeline_id, f.version_id, count(*), {", ".join(f"sum(f.{name})" for name in _MEASURED)}
            FROM embedline.finished_batch AS f GROUP BY f.pipeline_id, f.version_id
        ) AS b GROUP BY b.pipeline_id, b.version_id
    ) AS s
    INNER JOIN embedline.pipeline AS p ON p.pipeline_id = s.pipeline_id
    INNER JOIN embedline.version AS v ON v.version_id = s.version_id
    ORDER BY 1, 2
"""
_FAILURES = """
    SELECT p.name AS pipeline, v.number AS version, r.class, sum(r.count)::bigint AS request_failures_total
    FROM (
        SELECT t.pipeline_id, t.version_id, t.class, t.count FROM embedline.request_failure AS t
        UNION ALL
        SELECT b.pipeline_id, b.version_id, f.key, f.value::bigint
        FROM embedline.finished_batch AS b CROSS JOIN LATERAL jsonb_each_text(b.failures) AS f
        WHERE b.failures IS NOT NULL
    ) AS r
    INNER JOIN embedline.pipeline AS p ON p.pipeline_id = r.pipeline_id
    INNER JOIN embedline.version AS v ON v.version_id = r.version_id
    GROUP BY p.name, v.number, r.class ORDER BY 1, 2, 3
"""
_DERIVED = """
    SELECT d.name AS derived, d.waiting AS derived_pending_subjects,
        coalesce(round(extract(epoch FROM clock_timestamp() - d.oldest_enqueued_at)::numeric, 3)::float8, 0)
            AS derived_oldest_pending_age_seconds
    FROM embedline.derived_status AS d
"""
_MODELS = """
    SELECT m.name AS model, coalesce(c.failure_count > 0 AND c.open_until > clock_timestamp(), false)::int AS circuit_open,
        coalesce(c.failure_count, 0) AS circuit_failures
    FROM embedline.model AS m LEFT JOIN embedline.circuit AS c ON c.model_id = m.model_id ORDER BY m.name
"""
_MONEY = """
    WITH today AS (SELECT date_trunc('day', clock_timestamp(), 'UTC') AS starts_at)
    SELECT p.name AS pipeline, m.name AS model, sum(u.money)::float8 AS money_total
    FROM (
        SELECT d.pipeline_id, d.model_id, d.money FROM embedline.usage_day AS d, today AS t
        WHERE d.day = (t.starts_at AT TIME ZONE 'UTC')::date
        UNION ALL
        SELECT r.pipeline_id, r.model_id, r.tokens * r.price / 1000000 FROM embedline.reservation AS r, today AS t
        WHERE r.reserved_at >= t.starts_at
    ) AS u
    LEFT JOIN embedline.pipeline AS p ON p.pipeline_id = u.pipeline_id
    INNER JOIN embedline.model AS m ON m.model_id = u.model_id
    -- 0 stands for a reranking without a pipeline; another id without a row is that of a dropped pipeline.
    WHERE u.money IS NOT NULL AND (p.pipeline_id IS NOT NULL OR u.pipeline_id = 0) GROUP BY p.name, m.name ORDER BY 1, 2
"""
_BUDGETS = """
    SELECT CASE WHEN b.scope = 'pipeline' THEN b.name END AS pipeline, CASE WHEN b.scope = 'model' THEN b.name END AS model,
        b.period, b.unit, b.amount::float8 AS budget_amount, b.remaining::float8 AS budget_remaining
    FROM embedline.budget AS b ORDER BY 1, 2, 3, 4
"""
_WORKERS = """
    SELECT embedline._workers_alive() AS workers_alive, max(w.batch_rows) AS worker_batch_rows,
        coalesce(sum(w.requests_in_flight), 0) AS worker_requests_in_flight,
        round(max(w.commit_seconds)::numeric, 6)::float8 AS worker_commit_seconds,
        coalesce(bool_or(w.held_back_by IS NOT NULL), false)::int AS worker_held_back
    FROM (
        SELECT r.* FROM embedline.worker AS r WHERE r.reported_at > clock_timestamp() - interval '1 minute'
    ) AS w
"""
_MACHINE = """
    SELECT f.scheduled_workers AS workers_scheduled, f.memory_bytes, f.disk_bytes, f.disk_free_bytes
    FROM embedline._server_facts() AS f
"""
QUERIES = (
    *(_PIPELINES, _FINDINGS, _VERSION_INFO, _VERSIONS, _INDEXES, _DERIVED, _DONE, _FAILURES),
    *(_MODELS, _MONEY, _BUDGETS, _WORKERS, _MACHINE),
)
