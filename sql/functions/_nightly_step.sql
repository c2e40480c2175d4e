-- Do one step of the nightly run, a transaction of its own; only run_nightly calls it.
CREATE OR REPLACE FUNCTION embedline._nightly_step(
    step text,
    pipeline_name text,
    repair boolean,
    message text
)
RETURNS void
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
    from embedline.verify import nightly
    nightly.nightly_step(plpy, GD, step, pipeline_name, repair, message)
$python$;

COMMENT ON FUNCTION embedline._nightly_step(text, text, boolean, text) IS 'Internal: do one step of the nightly run.';
