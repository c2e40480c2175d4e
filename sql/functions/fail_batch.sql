-- Say why a claim could not be embedded. Whose fault it is is decided as for workers in the database.
CREATE OR REPLACE FUNCTION embedline.fail_batch(
    claim bigint, fence integer, failure text, detail text DEFAULT NULL, retry_after double precision DEFAULT NULL
)
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
    return calls.fail_batch(plpy, GD, claim, fence, failure, detail, retry_after)
$python$;

COMMENT ON FUNCTION embedline.fail_batch(bigint, integer, text, text, double precision) IS 'Say why a remote worker could not embed a claim: transient, throttled, unreachable, rejected, too_long, misconfigured or invalid_vectors.';
