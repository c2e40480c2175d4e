-- Embed stored chunks with any registered model; for preview_version. Only a role that controls the pipeline may,
-- because the source's owner may read these texts anyway.
CREATE OR REPLACE FUNCTION embedline._embed_chunks(pipeline_name text, model text, chunk_ids bigint [])
RETURNS TABLE (chunk_id bigint, vector bytea)
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $python$
    from embedline.gate import preview
    return preview.embed_chunks(plpy, GD, pipeline_name, model, chunk_ids)
$python$;

COMMENT ON FUNCTION embedline._embed_chunks(text, text, bigint []) IS 'Internal: embed stored chunks with any model, as float32, within budgets and rate limits.';
