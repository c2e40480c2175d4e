-- Remove the pg_cron jobs and let the resident workers end after their current batch.
CREATE OR REPLACE FUNCTION embedline.unschedule_workers()
RETURNS integer
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.worker import schedule
    return schedule.unschedule_workers(plpy, GD)
$python$;

COMMENT ON FUNCTION embedline.unschedule_workers() IS 'Remove the workers'' pg_cron jobs and stop the workers. Returns how many were asked to stop.';
