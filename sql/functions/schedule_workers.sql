-- Have pg_cron keep exactly this many resident workers running.
CREATE OR REPLACE FUNCTION embedline.schedule_workers(count integer DEFAULT 1)
RETURNS integer
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.worker import schedule
    return schedule.schedule_workers(plpy, GD, count)
$python$;

COMMENT ON FUNCTION embedline.schedule_workers(integer) IS 'Have pg_cron keep exactly count resident workers running.';
