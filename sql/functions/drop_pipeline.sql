-- Remove a pipeline with its vectors; the source table stays as it is.
CREATE OR REPLACE FUNCTION embedline.drop_pipeline(name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.pipelines import pipelines
    pipelines.drop_pipeline(plpy, GD, name)
$python$;

COMMENT ON FUNCTION embedline.drop_pipeline(text) IS 'Remove a pipeline with its triggers, routing view, chunks and vectors; the source table stays.';
