-- Note when each alert was first seen, and forget the ended ones. Workers and scrapes call it. It does nothing while
-- another session does so.
CREATE OR REPLACE FUNCTION embedline._note_alerts()
RETURNS void
LANGUAGE sql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $sql$
    -- 1164796209 is ALERTS_LOCK of embedline.postgres.locks.
    WITH turn AS MATERIALIZED (SELECT pg_try_advisory_xact_lock(1164796209) AS has_lock),
    found AS MATERIALIZED (
        SELECT c.alert, c.subject, coalesce(min(c.since), clock_timestamp()) AS since
        FROM turn AS t CROSS JOIN LATERAL embedline._alert_conditions() AS c
        WHERE t.has_lock
        GROUP BY c.alert, c.subject
    ),
    ended AS (
        DELETE FROM embedline.alert_state AS s USING turn AS t
        WHERE t.has_lock AND NOT EXISTS (SELECT FROM found AS f WHERE f.alert = s.alert AND f.subject = s.subject)
    )
    INSERT INTO embedline.alert_state (alert, subject, since)
    SELECT f.alert, f.subject, f.since FROM found AS f
    ON CONFLICT (alert, subject) DO NOTHING
$sql$;

COMMENT ON FUNCTION embedline._note_alerts() IS 'Internal: note when each alert was first seen.';
