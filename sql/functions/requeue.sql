-- Queue dead letters again: all of a pipeline, one key, or those of an error code; returns how many.
CREATE OR REPLACE FUNCTION embedline.requeue(
    pipeline text,
    key jsonb DEFAULT NULL,
    error_code text DEFAULT NULL,
    include_embedded boolean DEFAULT false
)
RETURNS bigint
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
    from embedline.queue import dead_letters
    return dead_letters.requeue(plpy, GD, pipeline, key, error_code, include_embedded)
$python$;

COMMENT ON FUNCTION embedline.requeue(text, jsonb, text, boolean) IS 'Queue dead letters again, all of a pipeline or those of a key or error code. Returns how many rows were queued.';
