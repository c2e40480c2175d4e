-- Stop embedding a pipeline; its changes are captured and wait.
CREATE OR REPLACE FUNCTION embedline.pause_pipeline(name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline import pipelines
    pipelines.set_pipeline_state(plpy, GD, name, "paused")
$python$;

COMMENT ON FUNCTION embedline.pause_pipeline(text) IS 'Stop embedding a pipeline; its changes are still captured and wait.';
