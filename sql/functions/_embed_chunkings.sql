-- Cut contents by several chunkings and embed the chunks; for compare_chunkings. Only a role that controls the pipeline
-- may, because it could have any text embedded by writing it into the source.
CREATE OR REPLACE FUNCTION embedline._embed_chunkings(
    pipeline_name text, specs jsonb, chunk_ids bigint [], contents text [], is_cut_only boolean
)
RETURNS TABLE (
    spec integer, document integer, chunk_start integer, chunk_end integer, tokens integer, vector bytea
)
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $python$
    from embedline.estimate import cut_sample
    return cut_sample.embed_chunkings(plpy, GD, pipeline_name, specs, chunk_ids, contents, is_cut_only)
$python$;

COMMENT ON FUNCTION embedline._embed_chunkings(text, jsonb, bigint [], text [], boolean) IS 'Internal: cut contents by several chunkings and embed the chunks, within budgets and rate limits.';
