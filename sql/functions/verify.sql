-- Find differences from the source and vectors of another model, and repair them if asked to. They come from changes
-- that no trigger saw.
-- Locks: ROW SHARE on the source, after the model has answered; row locks on Embedline's own tables, with SKIP LOCKED.
CREATE OR REPLACE FUNCTION embedline.verify(
    pipeline text,
    repair boolean DEFAULT false,
    sample integer DEFAULT 20
)
RETURNS TABLE (finding text, count bigint, repaired bigint, example jsonb)
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
AS $python$
    from embedline.verify import verify
    return verify.verify(plpy, GD, pipeline, repair, sample)
$python$;

COMMENT ON FUNCTION embedline.verify(text, boolean, integer) IS 'Compare a pipeline with its source, and a sample of its vectors with the model. Returns one row for each kind of finding, none if all is well.';
