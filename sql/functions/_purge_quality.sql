-- Thin out the series of quality: one measurement of each kind a day after a week, none after a year.
CREATE OR REPLACE FUNCTION embedline._purge_quality()
RETURNS void
LANGUAGE sql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM embedline.quality_check AS q
    WHERE q.measured_at < clock_timestamp() - interval '1 year' OR (
        q.measured_at < clock_timestamp() - interval '7 days' AND EXISTS (
            SELECT FROM embedline.quality_check AS n
            WHERE n.pipeline_id = q.pipeline_id AND n.kind = q.kind AND n.measured_at > q.measured_at
                AND n.measured_at < date_trunc('day', q.measured_at) + interval '1 day'
        )
    )
$sql$;

COMMENT ON FUNCTION embedline._purge_quality() IS 'Internal: thin out the series of quality.';
