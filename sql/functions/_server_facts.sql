-- Return what no catalogue knows: disk, memory, the package that runs here, and the workers that pg_cron is to run.
-- SECURITY DEFINER, because data_directory and the jobs are hidden from all but superusers.
CREATE OR REPLACE FUNCTION embedline._server_facts()
RETURNS TABLE (
    disk_free_bytes bigint, disk_bytes bigint, memory_bytes bigint, package_version text, scheduled_workers bigint
)
LANGUAGE plpython3u
STABLE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.observe import server_facts
    return server_facts.server_facts(plpy, GD)
$python$;

COMMENT ON FUNCTION embedline._server_facts() IS 'Internal: return disk and memory of the server, its package, and its scheduled workers.';
