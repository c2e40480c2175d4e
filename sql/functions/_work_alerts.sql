-- List the troubles of pipelines: their sources, queues, workers, dead letters and upgrades.
-- SECURITY DEFINER, because readers may not read dead letters and the state of workers.
CREATE OR REPLACE FUNCTION embedline._work_alerts()
RETURNS TABLE (severity text, alert text, subject text, since timestamptz, message text, remedy text)
LANGUAGE plpgsql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $plpgsql$
#variable_conflict use_column
BEGIN
    -- A session keeps the plan of this query; LANGUAGE sql would make it for each call, which takes 5 to 30 ms.
    RETURN QUERY
    WITH limits AS (
        SELECT coalesce(max(s.value) FILTER (WHERE s.name = 'alert_lag_seconds'), '60')::double precision AS lag_seconds
        FROM embedline.setting AS s
    ),

    status AS MATERIALIZED (SELECT t.* FROM embedline.status AS t),

    waiting AS (
        SELECT bool_or(t.pending > 0 OR NOT t.backfill_complete) AS has_work, max(t.workers_alive) AS alive,
            max(t.oldest_pending_age) AS age
        FROM status AS t WHERE t.state = 'active'
    ),

    -- Only the last check counts: an earlier one may be repaired by now.
    checked AS (
        SELECT DISTINCT ON (o.pipeline_id) p.name, o.verified_at, o.error, o.findings
        FROM embedline.verification AS o INNER JOIN embedline.pipeline AS p ON p.pipeline_id = o.pipeline_id
        ORDER BY o.pipeline_id, o.verified_at DESC
    ),

    unrepaired AS (
        SELECT c.name, c.verified_at, f.finding ->> 'name' AS finding,
            (f.finding ->> 'count')::bigint - coalesce((f.finding ->> 'repaired')::bigint, 0) AS count, f.finding -> 'example' AS example
        FROM checked AS c CROSS JOIN LATERAL jsonb_array_elements(c.findings) AS f (finding)
    )

    SELECT 'critical', 'source_changed', t.pipeline, NULL::timestamptz, t.last_error, t.remedy
    FROM status AS t WHERE t.remedy IS NOT NULL
    UNION ALL
    SELECT CASE WHEN t.oldest_pending_age > make_interval(secs => 15 * l.lag_seconds) THEN 'critical' ELSE 'warning' END,
        'search_stale', t.pipeline, clock_timestamp() - t.oldest_pending_age,
        format('%s changes wait, the oldest for %s', t.pending, date_trunc('second', t.oldest_pending_age)),
        CASE
            WHEN t.workers_alive = 0 THEN 'embedline worker --until-idle'
            ELSE format('SELECT * FROM embedline.progress WHERE pipeline = %L;', t.pipeline)
        END
    FROM status AS t CROSS JOIN limits AS l
    WHERE t.state = 'active' AND t.oldest_pending_age > make_interval(secs => l.lag_seconds)
    UNION ALL
    SELECT 'warning', 'derived_stale', d.name, d.oldest_enqueued_at,
        coalesce(
            'derived vectors cannot be computed: ' || d.last_error,
            format('%s subjects wait, the oldest for %s', d.waiting, date_trunc('second', clock_timestamp() - d.oldest_enqueued_at))
        ),
        format('SELECT * FROM embedline.derived_status WHERE name = %L;', d.name)
    FROM embedline.derived_status AS d
    INNER JOIN embedline.pipeline AS p ON p.name = d.pipeline CROSS JOIN limits AS l
    WHERE p.state = 'active'
        AND (d.last_error IS NOT NULL OR clock_timestamp() - d.oldest_enqueued_at > make_interval(secs => l.lag_seconds))
    UNION ALL
    SELECT 'note', 'paused', t.pipeline, NULL, format('the pipeline is paused; %s changes wait', t.pending),
        format('SELECT embedline.resume_pipeline(%L);', t.pipeline)
    FROM status AS t WHERE t.state = 'paused' AND t.pending > 0
    UNION ALL
    SELECT 'critical', 'no_worker', 'server', clock_timestamp() - w.age, CASE
            WHEN f.scheduled_workers > 0 THEN format('%s workers are scheduled and none is alive, while rows wait', f.scheduled_workers)
            ELSE 'rows wait and no worker is alive'
        END, CASE
            WHEN f.scheduled_workers > 0 THEN format('SELECT embedline.schedule_workers(%s);', f.scheduled_workers)
            ELSE 'embedline worker'
        END
    FROM waiting AS w CROSS JOIN limits AS l CROSS JOIN embedline._server_facts() AS f
    WHERE w.has_work AND w.alive = 0 AND (f.scheduled_workers > 0 OR w.age > make_interval(secs => l.lag_seconds))
    UNION ALL
    SELECT 'warning', 'workers_missing', 'server', NULL,
        format('%s of %s scheduled workers are alive', w.alive, f.scheduled_workers),
        format('SELECT embedline.schedule_workers(%s);', f.scheduled_workers)
    FROM waiting AS w CROSS JOIN embedline._server_facts() AS f
    WHERE w.alive BETWEEN 1 AND f.scheduled_workers - 1
    UNION ALL
    SELECT 'note', 'workers_slowed', t.held_back_by, NULL, 'workers take smaller batches: ' || t.held_back_by,
        'SELECT * FROM embedline.worker;'
    FROM status AS t WHERE t.held_back_by IS NOT NULL GROUP BY t.held_back_by
    UNION ALL
    SELECT 'warning', 'dead_letters', p.name, min(d.created_at),
        format('%s could not be embedded: %s', CASE count(*) WHEN 1 THEN '1 row' ELSE count(*) || ' rows' END, string_agg(DISTINCT d.error_code, ', ')),
        format('SELECT embedline.requeue(%L);', p.name)
    FROM embedline.dead_letter AS d INNER JOIN embedline.pipeline AS p ON p.pipeline_id = d.pipeline_id
    GROUP BY p.name
    UNION ALL
    SELECT 'warning', 'dead_letters', p.name || ' version ' || v.number, min(d.created_at),
        format('%s could not be embedded: %s', CASE count(*) WHEN 1 THEN '1 chunk' ELSE count(*) || ' chunks' END, string_agg(DISTINCT d.error_code, ', ')),
        format('SELECT embedline.requeue_version(%L, %s);', p.name, v.number)
    FROM embedline.version_dead_letter AS d
    INNER JOIN embedline.version AS v ON v.version_id = d.version_id
    INNER JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
    WHERE d.accepted_by IS NULL
    GROUP BY p.name, v.number
    UNION ALL
    SELECT 'critical', 'budget_exhausted', b.scope || ' ' || b.name, b.starts_at,
        format('the budget of %s %s a %s is used up; it begins again at %s', b.amount, b.unit, b.period, b.resets_at),
        format('SELECT embedline.set_budget(%L, %s => %L, %s => %s);', b.period, b.scope, b.name, b.unit, trim_scale(2 * b.amount))
    FROM embedline.budget AS b WHERE b.state = 'exhausted'
    UNION ALL
    SELECT 'warning', 'budget_low', b.scope || ' ' || b.name, NULL,
        format('%s %% of the budget of %s %s a %s are used up', round(100 * (1 - b.remaining / b.amount)), b.amount, b.unit, b.period),
        'SELECT * FROM embedline.budget;'
    FROM embedline.budget AS b WHERE b.state = 'open' AND b.amount > 0 AND b.remaining < 0.1 * b.amount
    UNION ALL
    SELECT 'warning', 'upgrade_stalled', p.name || ' version ' || v.number, NULL,
        coalesce(embedline._shown_error(v.last_error), 'nothing of the version was embedded for ten minutes'),
        format('SELECT * FROM embedline.versions WHERE pipeline = %L;', p.name)
    FROM embedline.version AS v INNER JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
    WHERE v.version_id <> p.serving_version_id AND v.state <> 'complete' AND p.state = 'active' AND (
        v.last_error IS NOT NULL OR (
            v.created_at < clock_timestamp() - interval '10 minutes' AND NOT EXISTS (
                SELECT FROM embedline.provider_batch AS o WHERE o.version_id = v.version_id AND o.state <> 'done'
            ) AND NOT EXISTS (
                SELECT FROM embedline.finished_batch AS b
                WHERE b.version_id = v.version_id AND b.finished_at > clock_timestamp() - interval '10 minutes'
            )
        )
    )
    UNION ALL
    SELECT 'warning', 'verification_failed', c.name, c.verified_at, 'verify ended with: ' || embedline._shown_error(c.error),
        format('SELECT * FROM embedline.verify(%L);', c.name)
    FROM checked AS c WHERE c.error IS NOT NULL
    UNION ALL
    SELECT CASE u.finding WHEN 'foreign' THEN 'critical' ELSE 'warning' END,
        CASE u.finding WHEN 'foreign' THEN 'model_changed' WHEN 'unreachable' THEN 'vectors_unreachable' ELSE 'unrepaired' END,
        u.name || CASE WHEN u.finding IN ('foreign', 'unreachable') THEN '' ELSE ' ' || u.finding END, u.verified_at,
        CASE u.finding
            WHEN 'foreign' THEN 'the model gives other vectors than those stored: ' || embedline._shown_error(u.example::text)
            WHEN 'unreachable' THEN format('search does not reach %s rows of a sample', u.count)
            ELSE format('verify found %s rows %s', u.count, u.finding)
        END,
        format('SELECT * FROM embedline.verify(%L, repair => true);', u.name)
    FROM unrepaired AS u
    WHERE u.finding <> 'pending' AND u.finding <> 'dead_letter'
        AND (u.count > 0 OR (u.finding = 'foreign' AND u.count IS NULL AND NOT u.example ? 'not_checked'))
    ;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._work_alerts() IS 'Internal: list the troubles of pipelines, their queues and workers.';
