-- Measure how well searches find, and keep the results as a series. Locks: none beyond reading.
CREATE OR REPLACE FUNCTION embedline.check_quality(pipeline_name text DEFAULT NULL, only_due boolean DEFAULT false)
RETURNS TABLE (
    pipeline text,
    kind text,
    value double precision,
    low double precision,
    high double precision,
    baseline double precision,
    queries integer,
    verdict text,
    detail text
)
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
-- Keys travel as text, so the session's own formats must not change them.
SET extra_float_digits = 1
SET datestyle = 'ISO'
SET timezone = 'UTC'
SET intervalstyle = 'postgres'
SET bytea_output = 'hex'
-- As in search.
SET plan_cache_mode = force_generic_plan
SET hnsw.iterative_scan = 'strict_order' -- noqa: PRS
SET hnsw.ef_search = 40
SET ivfflat.iterative_scan = 'relaxed_order'
SET ivfflat.probes = 1
AS $python$
    from embedline.observe import check_quality
    return check_quality.check_quality(plpy, GD, pipeline_name, only_due)
$python$;

COMMENT ON FUNCTION embedline.check_quality(text, boolean) IS 'Measure recall@10 of the canaries and of the index, the drift of the model, and the lag, of a pipeline or of all. Returns a row for each kind and keeps it. only_due: only what is due by setting quality_check_hours.';
