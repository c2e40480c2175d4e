-- Event trigger on CREATE INDEX: give an index build by pg_cron the settings that its statement names in a comment.
-- A pg_cron job is one statement in a session of its own, and SET beside CREATE INDEX CONCURRENTLY would make it a
-- transaction block. So the job's statement carries its settings in a comment, and they are set as it begins. A
-- session may set them for itself anyway. A statement without the comment is left alone (20 µs).
-- Two concurrent builds on one table deadlock: the second waits for the first's lock, the first for the second's
-- snapshot. So the second gives up after 3 s, and its job is run again a minute later. It waits these 3 s because a
-- job whose index is valid has nothing to do, but could take the lock first every minute.
CREATE OR REPLACE FUNCTION embedline._on_create_index()
RETURNS event_trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    build text [] := regexp_match(
        current_query(),
        ' ON (embedline_data\.\S+) .*/\* embedline build: maintenance_work_mem = (\d+kB), '
        'max_parallel_maintenance_workers = (\d+) \*/\s*;?\s*$'
    );
    patience timestamptz := clock_timestamp() + interval '3 seconds';
BEGIN
    IF build IS NULL THEN
        RETURN;
    END IF;
    -- 1164798257 is BUILD_LOCK_CLASS of embedline.postgres.locks. The lock ends with the session.
    WHILE NOT pg_try_advisory_lock(1164798257, to_regclass(build[1])::oid::integer) LOOP
        IF clock_timestamp() > patience THEN
            RAISE EXCEPTION 'another index on % is being built', build[1]
                USING ERRCODE = 'lock_not_available', HINT = 'The job of pg_cron tries again in a minute.';
        END IF;
        PERFORM pg_sleep(0.1);
    END LOOP;
    -- For the session, because a concurrent build has several transactions.
    PERFORM set_config('maintenance_work_mem', build[2], false);
    PERFORM set_config('max_parallel_maintenance_workers', build[3], false);
END
$plpgsql$;

COMMENT ON FUNCTION embedline._on_create_index() IS 'Internal: event trigger function that gives an index build by pg_cron its settings.';

DROP EVENT TRIGGER IF EXISTS embedline_build_settings; -- noqa: PRS
CREATE EVENT TRIGGER embedline_build_settings
ON ddl_command_start
WHEN TAG IN ('CREATE INDEX')
EXECUTE FUNCTION embedline._on_create_index();
