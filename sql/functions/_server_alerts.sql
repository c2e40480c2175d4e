-- List the troubles of the server: disk, package, extensions and jobs.
-- SECURITY DEFINER, because the jobs and their runs are hidden from all but superusers.
CREATE OR REPLACE FUNCTION embedline._server_alerts()
RETURNS TABLE (severity text, alert text, subject text, since timestamptz, message text, remedy text)
LANGUAGE plpgsql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $plpgsql$
#variable_conflict use_column
BEGIN
    -- A session keeps the plan of this query; LANGUAGE sql would make it for each call, which takes 5 to 30 ms.
    RETURN QUERY
    WITH facts AS MATERIALIZED (SELECT f.* FROM embedline._server_facts() AS f),

    limits AS (
        SELECT coalesce(max(s.value) FILTER (WHERE s.name = 'alert_disk_percent'), '10')::numeric AS disk_percent,
            max(s.value) FILTER (WHERE s.name = 'version') AS version
        FROM embedline.setting AS s
    )

    SELECT 'critical', 'disk_low', 'server', NULL::timestamptz,
        format('%s of %s are free on the disk of the data directory', pg_size_pretty(f.disk_free_bytes), pg_size_pretty(f.disk_bytes)),
        'SELECT relname, pg_size_pretty(pg_total_relation_size(relid)) FROM pg_stat_all_tables ORDER BY pg_total_relation_size(relid) DESC LIMIT 10;'
    FROM facts AS f CROSS JOIN limits AS l
    WHERE f.disk_free_bytes < f.disk_bytes * l.disk_percent / 100
    UNION ALL
    SELECT 'critical', 'version_skew', 'server', NULL,
        format('the package is %s and the schema %s', f.package_version, l.version), 'embedline upgrade'
    FROM facts AS f CROSS JOIN limits AS l WHERE f.package_version <> l.version
    UNION ALL
    SELECT 'critical', 'job_failing', j.jobs, NULL, j.trouble, j.remedy FROM embedline._job_troubles() AS j
    UNION ALL
    SELECT 'note', 'old_pgvector', 'server', NULL,
        format('pgvector %s has faults that 0.8.4 mends, unless its packager has mended them', e.extversion),
        CASE
            WHEN e.extversion <> e.default_version THEN 'ALTER EXTENSION vector UPDATE;'
            ELSE format('apt-get install postgresql-%s-pgvector', current_setting('server_version_num')::integer / 10000)
        END
    FROM (
        SELECT x.extversion, a.default_version,
            string_to_array(split_part(x.extversion, '-', 1), '.')::integer [] AS number
        FROM pg_extension AS x INNER JOIN pg_available_extensions AS a ON a.name = x.extname
        WHERE x.extname = 'vector'
    ) AS e
    WHERE e.number < '{0,8,4}'
    ;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._server_alerts() IS 'Internal: list the troubles of the server.';
