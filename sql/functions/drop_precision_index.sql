-- Drop a shadow index of a version; refuses while search uses it.
-- Locks: ACCESS EXCLUSIVE on the version's table for an instant; waits at most 5 s.
CREATE OR REPLACE FUNCTION embedline.drop_precision_index(pipeline_name text, version_number integer, name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.indexes import precision
    precision.drop_precision_index(plpy, GD, pipeline_name, version_number, name)
$python$;

COMMENT ON FUNCTION embedline.drop_precision_index(text, integer, text) IS 'Drop a shadow index of a version.';
