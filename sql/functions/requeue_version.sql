-- Queue the chunks again that a version could not embed.
CREATE OR REPLACE FUNCTION embedline.requeue_version(pipeline_name text, version_number integer)
RETURNS bigint
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.versions import fill
    return fill.requeue_version(plpy, GD, pipeline_name, version_number)
$python$;

COMMENT ON FUNCTION embedline.requeue_version(text, integer) IS 'Queue the chunks in embedline.version_dead_letter again, with their attempts counted from 0, and return how many.';
