-- Embed a paused pipeline again.
CREATE OR REPLACE FUNCTION embedline.resume_pipeline(name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.pipelines import state
    return state.resume_pipeline(plpy, GD, name)
$python$;

COMMENT ON FUNCTION embedline.resume_pipeline(text) IS 'Embed a paused pipeline again, beginning with the changes that have waited.';
