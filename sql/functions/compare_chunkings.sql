-- Compare chunkings of a pipeline on a sample of its rows, by queries whose answers are known. Changes nothing but the
-- ledger. Locks: none beyond reading. Runs with the caller's rights. A helper embeds the sample, within budgets.
CREATE OR REPLACE FUNCTION embedline.compare_chunkings(
    pipeline_name text,
    specs jsonb,
    canaries regclass,
    k integer DEFAULT 5,
    sample_rows integer DEFAULT 1000,
    seed bigint DEFAULT 0,
    estimate_only boolean DEFAULT false
)
RETURNS TABLE (
    chunking text,
    recall double precision,
    difference double precision,
    low double precision,
    high double precision,
    chunks integer,
    mean_tokens double precision,
    mean_characters double precision,
    tokens bigint,
    money numeric,
    detail text
)
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $python$
    from embedline.estimate import compare_chunkings
    return compare_chunkings.compare_chunkings(
        plpy, GD, pipeline_name, specs, canaries, k, sample_rows, seed, estimate_only
    )
$python$;

COMMENT ON FUNCTION embedline.compare_chunkings(text, jsonb, regclass, integer, integer, bigint, boolean) IS 'Compare chunkings on a sample of a pipeline''s rows: recall of the answers in the k best chunks, sizes, tokens and cost. The pipeline''s model embeds the sample with each; estimate_only => true sends nothing.';
