-- Replace the canaries of a pipeline. Only set_canaries calls it, which reads them with its caller's rights.
CREATE OR REPLACE FUNCTION embedline._store_canaries(pipeline_name text, queries jsonb)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.observe import labelled_queries
    labelled_queries.store_canaries(plpy, GD, pipeline_name, queries)
$python$;

COMMENT ON FUNCTION embedline._store_canaries(text, jsonb) IS 'Internal: replace the canaries of a pipeline.';
