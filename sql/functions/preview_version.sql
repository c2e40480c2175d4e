-- Preview a model before anything is embedded with it: the gate's comparison, over a bridge of the two models.
-- Locks: none beyond reading. Runs with the caller's rights. A helper embeds the sample, within budgets and limits.
CREATE OR REPLACE FUNCTION embedline.preview_version(
    pipeline_name text,
    model text,
    canaries regclass DEFAULT NULL,
    sample integer DEFAULT 3000,
    k integer DEFAULT 10,
    margin double precision DEFAULT 0.01,
    query_count integer DEFAULT 500,
    seed bigint DEFAULT 0
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
AS $python$
    from embedline.gate import preview
    return preview.preview_version(
        plpy, GD, pipeline_name, model, canaries, sample, k, margin, query_count, seed
    )
$python$;

COMMENT ON FUNCTION embedline.preview_version(text, text, regclass, integer, integer, double precision, integer, bigint) IS 'Preview a model against the serving one. A sample is embedded with it and the other vectors are mapped, so it understates the new model and permits no cutover.';
