-- End this session's remote worker: what it has claimed is free at once, and no row is charged.
CREATE OR REPLACE FUNCTION embedline.release_batches()
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Keys travel as text, so the session's own formats must not change them.
SET extra_float_digits = 1
SET datestyle = 'ISO'
SET timezone = 'UTC'
SET intervalstyle = 'postgres'
SET bytea_output = 'hex'
AS $python$
    from embedline.worker.remote import calls
    return calls.release_batches(plpy, GD)
$python$;

COMMENT ON FUNCTION embedline.release_batches() IS 'End this session''s remote worker and free its claims, uncharged.';
