-- Have pg_cron build a version's missing indexes. Refuses while the version is not verified to be complete.
-- Locks: ACCESS EXCLUSIVE on the version's table for an instant to drop an INVALID leftover; waits at most 5 s.
CREATE OR REPLACE FUNCTION embedline.build_vector_index(pipeline_name text, version_number integer DEFAULT NULL)
RETURNS text
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.indexes import build
    return build.build_vector_index(plpy, GD, pipeline_name, version_number)
$python$;

COMMENT ON FUNCTION embedline.build_vector_index(text, integer) IS 'Have pg_cron build a version''s missing indexes, and return the steps that follow.';
