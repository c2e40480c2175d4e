-- Write the vectors of one claim: float32, little-endian, in the order of its texts. Checks all that it is given.
CREATE OR REPLACE FUNCTION embedline.finish_batch(
    claim bigint, fence integer, vectors bytea, tokens bigint DEFAULT NULL
)
RETURNS integer
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
    return calls.finish_batch(plpy, GD, claim, fence, vectors, tokens)
$python$;

COMMENT ON FUNCTION embedline.finish_batch(bigint, integer, bytea, bigint) IS 'Write the vectors of a remote worker''s claim: float32, little-endian, in the order of its texts. Returns how many rows are embedded by it; 0 while others of the same row are awaited.';
