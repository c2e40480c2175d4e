-- Stop embedding a pipeline. Its changes are captured and wait.
CREATE OR REPLACE FUNCTION embedline.pause_pipeline(name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.pipelines import state
    return state.pause_pipeline(plpy, GD, name)
$python$;

COMMENT ON FUNCTION embedline.pause_pipeline(text) IS 'Stop embedding a pipeline. Its changes are still captured and wait.';
