-- Write pairs for fine-tuning into a table of yours, from searches that sample_queries had noted. Locks: an INSERT's.
-- Runs with the caller's rights: the source and the table are read and written as the caller may.
CREATE OR REPLACE FUNCTION embedline.collect_pairs(
    pipeline_name text,
    pairs regclass,
    query_count integer DEFAULT 1000,
    reranker text DEFAULT NULL
)
RETURNS TABLE (outcome text, queries integer)
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
-- As in search.
SET hnsw.iterative_scan = 'strict_order' -- noqa: PRS
SET hnsw.ef_search = 40
SET ivfflat.iterative_scan = 'relaxed_order'
SET ivfflat.probes = 1
AS $python$
    from embedline.gate import collect_pairs
    return collect_pairs.collect_pairs(plpy, GD, pipeline_name, pairs, query_count, reranker)
$python$;

COMMENT ON FUNCTION embedline.collect_pairs(text, regclass, integer, text) IS 'Add noted queries to a table (query, key, grade, source, at). Each gets the row that words and vectors both rank first, or that a reranker does. Canaries and queries that are there already are left out.';
