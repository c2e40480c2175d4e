-- Count the workers whose session lock is held. Reading pg_locks needs no right of the caller.
CREATE OR REPLACE FUNCTION embedline._workers_alive()
RETURNS bigint
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    -- 1164797804 is WORKER_LOCK_CLASS of embedline.postgres.locks.
    SELECT count(*) FROM pg_locks AS l
    WHERE
        l.locktype = 'advisory' AND l.classid = 1164797804::oid AND l.objsubid = 2 AND l.granted
        AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database());
$sql$;

COMMENT ON FUNCTION embedline._workers_alive() IS 'Internal: count the resident workers of this database.';
