-- Remove noted queries that are over their retention, or beyond the newest 10,000 of a pipeline.
CREATE OR REPLACE FUNCTION embedline._purge_query_samples()
RETURNS void
LANGUAGE sql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH bounds AS MATERIALIZED (
        SELECT p.pipeline_id, greatest(
                clock_timestamp() - p.query_retention,
                (
                    SELECT n.asked_at FROM embedline.query_sample AS n
                    WHERE n.pipeline_id = p.pipeline_id ORDER BY n.asked_at DESC OFFSET 9999 LIMIT 1
                )
            ) AS oldest
        FROM embedline.pipeline AS p WHERE p.query_sample_share > 0
    )

    DELETE FROM embedline.query_sample AS s USING bounds AS b
    WHERE s.pipeline_id = b.pipeline_id AND s.asked_at < b.oldest
$sql$;

COMMENT ON FUNCTION embedline._purge_query_samples() IS 'Internal: remove noted queries that are over their retention.';
