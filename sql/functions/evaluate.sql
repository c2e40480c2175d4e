-- Measure a version against the serving one: the gate that cutover requires. Locks: none beyond reading.
-- Runs with the caller's rights: the canaries, the source's grants and its row-level security are the caller's.
CREATE OR REPLACE FUNCTION embedline.evaluate(
    pipeline_name text,
    version_number integer,
    canaries regclass DEFAULT NULL,
    k integer DEFAULT 10,
    margin double precision DEFAULT 0.01,
    query_count integer DEFAULT 500,
    breakdown name DEFAULT NULL,
    seed bigint DEFAULT 0,
    min_recall double precision DEFAULT 0.9,
    mode text DEFAULT NULL
)
RETURNS TABLE (
    measure text,
    old double precision,
    new double precision,
    difference double precision,
    low double precision,
    high double precision,
    verdict text,
    detail text
)
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
-- As in search. The planner's switches are set inside, and restored at the end.
SET hnsw.iterative_scan = 'strict_order' -- noqa: PRS
SET hnsw.ef_search = 40
SET ivfflat.iterative_scan = 'relaxed_order'
SET ivfflat.probes = 1
SET enable_seqscan = on
SET enable_sort = on
SET enable_nestloop = on
SET enable_indexscan = on
AS $python$
    from embedline.gate import evaluate
    return evaluate.evaluate(
        plpy, GD, pipeline_name, version_number, canaries, k, margin, query_count, breakdown, seed, min_recall,
        mode
    )
$python$;

COMMENT ON FUNCTION embedline.evaluate(text, integer, regclass, integer, double precision, integer, name, bigint, double precision, text) IS 'Measure a version against the serving one: recall of its index; nDCG, recall and MRR of both; latency. The verdict is pass, fail or inconclusive, and is stored as evidence for cutover. With mode: search by it against search as it is, as evidence for use_mode.';
