-- List what the last measurements of quality found of the versions that serve.
CREATE OR REPLACE FUNCTION embedline._quality_alerts()
RETURNS TABLE (severity text, alert text, subject text, since timestamptz, message text, remedy text)
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $sql$
    WITH poor AS MATERIALIZED (
        SELECT p.name, v.vectors_valid_from, q.*, (
            SELECT min(b.measured_at) FROM embedline.quality_check AS b
            WHERE b.pipeline_id = q.pipeline_id AND b.kind = q.kind AND b.is_poor AND b.measured_at > coalesce((
                SELECT g.measured_at FROM embedline.quality_check AS g
                WHERE g.pipeline_id = q.pipeline_id AND g.kind = q.kind AND NOT g.is_poor AND g.error IS NULL
                ORDER BY g.measured_at DESC LIMIT 1
            ), '-infinity')
        ) AS since
        -- From the poor ones, which have an index: 1,000 pipelines have 5,000 last measurements.
        FROM embedline.quality_check AS q
        INNER JOIN embedline.pipeline AS p ON p.pipeline_id = q.pipeline_id AND p.serving_version_id = q.version_id
        INNER JOIN embedline.version AS v ON v.version_id = q.version_id
        WHERE q.is_poor AND NOT EXISTS (
            SELECT FROM embedline.quality_check AS n
            WHERE n.pipeline_id = q.pipeline_id AND n.kind = q.kind AND n.measured_at > q.measured_at AND n.error IS NULL
        )
    )

    SELECT 'warning', 'quality_fell', CASE r.kind WHEN 'canary' THEN r.name ELSE r.name || ' ' || r.kind END, r.since,
        format(
            'recall@10 %s is %s (%s to %s), and was %s; if that is meant, embedline.accept_quality(%L) makes it the baseline',
            CASE r.kind WHEN 'canary' THEN 'of the canaries' WHEN 'reach' THEN 'of the index' ELSE 'of the index for real queries' END,
            round(r.value::numeric, 3), round(r.low::numeric, 3), round(r.high::numeric, 3), round(r.baseline::numeric, 3), r.name
        ),
        format('SELECT * FROM embedline.verify(%L, repair => true);', r.name)
    FROM poor AS r WHERE r.kind IN ('canary', 'reach', 'fidelity')
    UNION ALL
    SELECT 'critical', 'model_changed', r.name, r.since,
        format('the model gives other vectors than before: the lowest cosine of %s probe texts is %s', r.query_count, round(r.value::numeric, 4)),
        format('SELECT * FROM embedline.verify(%L, repair => true);', r.name)
    FROM poor AS r
    WHERE r.kind = 'drift' AND (r.vectors_valid_from IS NULL OR r.vectors_valid_from < r.measured_at) AND NOT EXISTS (
        -- verify found the same, and its alert says so.
        SELECT FROM (
            SELECT o.findings FROM embedline.verification AS o
            WHERE o.pipeline_id = r.pipeline_id ORDER BY o.verified_at DESC LIMIT 1
        ) AS l
        CROSS JOIN LATERAL jsonb_array_elements(l.findings) AS f (finding)
        WHERE f.finding ->> 'name' = 'foreign' AND (f.finding ->> 'count')::bigint > coalesce((f.finding ->> 'repaired')::bigint, 0)
    )
    UNION ALL
    SELECT 'warning', 'indexing_lag', r.name, r.since,
        format('a changed row was found only after %s seconds', round(r.value::numeric, 1)),
        format('SELECT * FROM embedline.batch WHERE pipeline = %L LIMIT 20;', r.name)
    FROM poor AS r WHERE r.kind = 'lag'
$sql$;

COMMENT ON FUNCTION embedline._quality_alerts() IS 'Internal: list what the last measurements of quality found.';
