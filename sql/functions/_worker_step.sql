-- Do one step of this session's resident worker, a transaction of its own; only run_worker calls it.
CREATE OR REPLACE FUNCTION embedline._worker_step(
    step text,
    slot integer,
    pipeline_name text,
    message text
)
RETURNS text
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
    from embedline.worker import procedure
    return procedure.worker_step(plpy, GD, step, slot, pipeline_name, message)
$python$;

COMMENT ON FUNCTION embedline._worker_step(text, integer, text, text) IS 'Internal: do one step of the resident worker.';
