-- Have the version serve again that served before the last cutover. Locks: as embedline.cutover.
CREATE OR REPLACE FUNCTION embedline.rollback(pipeline_name text)
RETURNS integer
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $python$
    from embedline.versions import cutover
    return cutover.rollback(plpy, GD, pipeline_name)
$python$;

COMMENT ON FUNCTION embedline.rollback(text) IS 'Return to the version that served before the last cutover, with everything written since, and return its number.';
