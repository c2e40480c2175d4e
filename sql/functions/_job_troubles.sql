-- Our pg_cron jobs that do not run, why, and what to run: for schedule_workers and `embedline doctor`.
CREATE OR REPLACE FUNCTION embedline._job_troubles()
RETURNS TABLE (jobs text, trouble text, remedy text)
LANGUAGE plpython3u
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.worker import schedule
    return schedule.job_troubles(plpy, GD)
$python$;

COMMENT ON FUNCTION embedline._job_troubles() IS 'Internal: jobs of this database that do not run, why, and the statements to run.';
