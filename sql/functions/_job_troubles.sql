-- List our pg_cron jobs that do not run, with the reason and the remedy. For schedule_workers and `embedline doctor`.
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

COMMENT ON FUNCTION embedline._job_troubles() IS 'Internal: list the jobs of this database that do not run, with the reason and the statements to run.';
