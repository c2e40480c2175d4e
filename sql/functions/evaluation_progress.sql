-- List each evaluate, preview_version or compare_chunkings that runs now, with its step and progress. Reads only locks.
-- SECURITY DEFINER, because the start of another role's statement is hidden from all but superusers.
CREATE OR REPLACE FUNCTION embedline.evaluation_progress(pipeline_name text DEFAULT NULL)
RETURNS TABLE (
    pid integer,
    task text,
    pipeline text,
    version integer,
    step text,
    percent double precision,
    seconds double precision
)
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.catalog import progress
    return progress.evaluation_progress(plpy, GD, pipeline_name)
$python$;

COMMENT ON FUNCTION embedline.evaluation_progress(text) IS 'List each evaluate, preview_version and compare_chunkings that runs now, with its step and progress.';
