-- Have pg_cron run embedline.run_nightly() once a day; NULL removes the job.
CREATE OR REPLACE FUNCTION embedline.schedule_nightly(at time DEFAULT '03:30', repair boolean DEFAULT true)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.worker import schedule
    schedule.schedule_nightly(plpy, GD, at, repair)
$python$;

COMMENT ON FUNCTION embedline.schedule_nightly(time, boolean) IS 'Have pg_cron verify and repair every pipeline once a day, in pg_cron''s time zone (GMT by default). NULL removes the job.';
