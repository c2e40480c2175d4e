-- Take a step of a check that is due, for an idle resident worker.
CREATE OR REPLACE FUNCTION embedline._quality_step(pipeline_name text, is_last boolean)
RETURNS text
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
    return check_quality.quality_step(plpy, GD, pipeline_name, is_last)
$python$;

COMMENT ON FUNCTION embedline._quality_step(text, boolean) IS 'Internal: take a step of a check of quality that is due.';
