-- List what is wrong now, for embedline.alert. `since` is NULL if no table tells it. Without jit, which would compile
-- the many parts for seconds and run them for milliseconds.
CREATE OR REPLACE FUNCTION embedline._alert_conditions()
RETURNS TABLE (severity text, alert text, subject text, since timestamptz, message text, remedy text)
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $sql$
    SELECT a.severity, a.alert, a.subject, a.since, a.message, a.remedy FROM embedline._work_alerts() AS a
    UNION ALL
    SELECT a.severity, a.alert, a.subject, a.since, a.message, a.remedy FROM embedline._provider_alerts() AS a
    UNION ALL
    SELECT a.severity, a.alert, a.subject, a.since, a.message, a.remedy FROM embedline._index_alerts() AS a
    UNION ALL
    SELECT a.severity, a.alert, a.subject, a.since, a.message, a.remedy FROM embedline._server_alerts() AS a
    UNION ALL
    SELECT a.severity, a.alert, a.subject, a.since, a.message, a.remedy FROM embedline._quality_alerts() AS a
$sql$;

COMMENT ON FUNCTION embedline._alert_conditions() IS 'Internal: list what is wrong now.';
