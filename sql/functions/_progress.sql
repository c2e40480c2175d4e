-- List the tasks that are under way, for embedline.progress. Totals of backfills and fills are estimates, because
-- counting a large table takes longer than a second.
-- SECURITY DEFINER, because a reader may not name the schema of the generated tables.
CREATE OR REPLACE FUNCTION embedline._progress()
RETURNS TABLE (
    pipeline text, version integer, task text, phase text, done bigint, total bigint, unit text, percent numeric,
    rate numeric, tokens bigint, money numeric
)
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $sql$
    WITH pace AS (
        SELECT b.version_id, b.kind, round(sum(b.row_count) / greatest(
            least(60, extract(epoch FROM clock_timestamp() - min(b.finished_at))), 1
        ), 1) AS rate
        FROM embedline.finished_batch AS b
        WHERE b.finished_at > clock_timestamp() - interval '60 seconds'
        GROUP BY b.version_id, b.kind
    ),

    known AS (
        SELECT p.name, v.version_id, v.number, p.source AS source_oid, u.tokens, u.money, t.backfill_complete,
            t.backfill_percent, t.backfill_done, t.backfill_total, t.pending,
            CASE
                WHEN t.state <> 'active' THEN t.state
                WHEN x.open_until > clock_timestamp() THEN 'model rests'
                WHEN t.workers_alive = 0 THEN 'no worker'
                ELSE coalesce(t.held_back_by, 'embedding')
            END AS phase
        FROM embedline.status AS t
        INNER JOIN embedline.pipeline AS p ON p.name = t.pipeline
        INNER JOIN embedline.version AS v ON v.version_id = p.serving_version_id
        LEFT JOIN embedline.circuit AS x ON x.model_id = v.model_id
        LEFT JOIN LATERAL (
            SELECT sum(s.tokens)::bigint AS tokens, sum(s.money) AS money FROM embedline.usage AS s
            WHERE s.pipeline = p.name AND s.model = t.model AND s.day >= (v.created_at AT TIME ZONE 'UTC')::date
        ) AS u ON NOT t.backfill_complete OR t.pending > 0
    ),

    filled AS (
        SELECT p.name, v.number, v.version_id, v.model_id, v.created_at, v.last_error, m.name AS model, p.state,
            greatest((
                SELECT c.reltuples FROM pg_class AS c
                WHERE c.oid = to_regclass(format(
                    'embedline_data.%I', p.name || CASE WHEN v.chunk_set = 1 THEN '_chunk' ELSE '_chunk_' || v.chunk_set END
                ))
            ), 0)::bigint AS total,
            coalesce((
                SELECT sum(coalesce(cardinality(q.chunk_ids), q.end_id - q.first_id)) FROM embedline.version_queue AS q
                WHERE q.version_id = v.version_id
            ), 0)::bigint AS open
        FROM embedline.version AS v
        INNER JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
        INNER JOIN embedline.model AS m ON m.model_id = v.model_id
        WHERE v.version_id <> p.serving_version_id AND v.state <> 'complete'
    )

    SELECT k.name, k.number, 'backfill', k.phase,
        CASE WHEN c.rows > 0 THEN trunc(c.rows * k.backfill_percent / 100) ELSE k.backfill_done END::bigint,
        CASE WHEN c.rows > 0 THEN c.rows ELSE k.backfill_total END::bigint,
        CASE WHEN c.rows > 0 THEN 'rows' ELSE 'blocks' END,
        k.backfill_percent::numeric,
        CASE WHEN c.rows > 0 THEN n.rate END,
        k.tokens, k.money
    FROM known AS k
    CROSS JOIN LATERAL (SELECT max(r.reltuples)::bigint AS rows FROM pg_class AS r WHERE r.oid = k.source_oid) AS c
    LEFT JOIN pace AS n ON n.version_id = k.version_id AND n.kind = 'backfill'
    WHERE NOT k.backfill_complete
    UNION ALL
    SELECT k.name, k.number, 'changes', k.phase, NULL, k.pending, 'rows', NULL, n.rate, k.tokens, k.money
    FROM known AS k LEFT JOIN pace AS n ON n.version_id = k.version_id AND n.kind = 'change'
    WHERE k.pending > 0
    UNION ALL
    -- Chunk ids have gaps, so these are shares of their range.
    SELECT p.name, v.number, 'keywords', CASE p.state WHEN 'active' THEN 'indexing' ELSE p.state END, b.built_to, b.build_to,
        'chunks', round(100.0 * b.built_to / greatest(b.build_to, 1), 1),
        round((b.built_to / greatest(extract(epoch FROM clock_timestamp() - b.begun_at), 1))::numeric, 1), NULL, NULL
    FROM embedline.keyword_build AS b
    INNER JOIN embedline.chunk_set AS s ON s.chunk_set_id = b.chunk_set_id
    INNER JOIN embedline.pipeline AS p ON p.pipeline_id = s.pipeline_id
    INNER JOIN embedline.version AS v ON v.version_id = p.serving_version_id
    WHERE b.built_to < b.build_to
    UNION ALL
    SELECT f.name, f.number, 'fill',
        CASE
            WHEN f.state <> 'active' THEN f.state
            WHEN x.open_until > clock_timestamp() THEN 'model rests'
            WHEN embedline._workers_alive() = 0 THEN 'no worker'
            ELSE 'embedding'
        END,
        f.total - least(f.open, f.total), f.total, 'chunks',
        CASE WHEN f.total > 0 THEN least(trunc(100.0 * (f.total - least(f.open, f.total)) / f.total, 1), 99.9) END,
        n.rate, u.tokens, u.money
    FROM filled AS f
    LEFT JOIN embedline.circuit AS x ON x.model_id = f.model_id
    LEFT JOIN pace AS n ON n.version_id = f.version_id AND n.kind = 'fill'
    CROSS JOIN LATERAL (
        SELECT sum(s.tokens)::bigint AS tokens, sum(s.money) AS money FROM embedline.usage AS s
        WHERE s.pipeline = f.name AND s.model = f.model AND s.day >= (f.created_at AT TIME ZONE 'UTC')::date
    ) AS u
    UNION ALL
    SELECT s.pipeline, v.number, 'derived ' || s.name, coalesce(s.last_error, 'computing'), NULL, s.waiting, 'subjects', NULL, NULL, NULL, NULL
    FROM embedline.derived_status AS s
    INNER JOIN embedline.pipeline AS p ON p.name = s.pipeline
    INNER JOIN embedline.version AS v ON v.version_id = p.serving_version_id
    WHERE s.waiting > 0
    UNION ALL
    SELECT i.pipeline, i.version, 'index', i.name || coalesce(': ' || i.phase, ''), NULL, NULL, NULL,
        round(i.percent::numeric, 1), NULL, NULL, NULL
    FROM embedline.index_progress() AS i WHERE i.state = 'building'
    UNION ALL
    SELECT e.pipeline, e.version, e.task, e.step, NULL, NULL, NULL, round(e.percent::numeric, 1), NULL, NULL, NULL
    FROM embedline.evaluation_progress() AS e
$sql$;

COMMENT ON FUNCTION embedline._progress() IS 'Internal: list the tasks under way, for embedline.progress.';
