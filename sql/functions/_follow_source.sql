-- Recreate a pipeline's functions for its source as it is now.
CREATE OR REPLACE FUNCTION embedline._follow_source(pipeline_name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.pipelines import follow
    follow.follow_source(plpy, GD, pipeline_name)
$python$;

COMMENT ON FUNCTION embedline._follow_source(text) IS 'Internal: follow a change of a source; called by the event trigger.';
