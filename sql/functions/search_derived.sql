-- Return the k rows of a pipeline that are nearest to a subject's vector. Runs with the caller's rights: grants and
-- row-level security of the source and of the events decide.
CREATE OR REPLACE FUNCTION embedline.search_derived(
    name text,
    subject text,
    k integer DEFAULT 10,
    leave_out_seen boolean DEFAULT false,
    per_document boolean DEFAULT true
)
RETURNS TABLE (
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
AS $python$
    from embedline.search import search_derived
    return search_derived.search_derived(plpy, GD, name, subject, k, leave_out_seen, per_document)
$python$;

COMMENT ON FUNCTION embedline.search_derived(text, text, integer, boolean, boolean) IS 'Return the k rows that are nearest to a subject''s derived vector, by their best chunk. per_document => false returns chunks, leave_out_seen => true no row that the subject had.';
