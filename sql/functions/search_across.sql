-- Return the k best chunks of several pipelines for a text. Their vectors must be of one space: the same
-- model, dimensions and distance. Runs with the caller's rights: grants and row-level security of each source decide.
CREATE OR REPLACE FUNCTION embedline.search_across(
    pipeline_names text [],
    query text,
    k integer DEFAULT 10,
    per_document boolean DEFAULT false
)
RETURNS TABLE (
    pipeline text,
    key text,
    chunk text,
    score double precision,
    chunk_start integer,
    chunk_end integer
)
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
-- The vector is a parameter, so one plan serves all.
SET plan_cache_mode = force_generic_plan
-- Without an iterative scan, dead tuples and row-level security would shorten the result.
SET hnsw.iterative_scan = 'strict_order' -- noqa: PRS
SET hnsw.ef_search = 40
SET ivfflat.iterative_scan = 'relaxed_order'
SET ivfflat.probes = 1
AS $python$
    from embedline.search import search_across
    return search_across.search_across(plpy, GD, pipeline_names, query, k, per_document)
$python$;

COMMENT ON FUNCTION embedline.search_across(text[], text, integer, boolean) IS 'Return the k best chunks of several pipelines for a text, or each source row''s best chunk with per_document => true. Refused unless their serving versions have the same model, dimensions and distance.';
