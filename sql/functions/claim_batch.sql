-- Claim texts for this session, which is a remote worker from its first claim on. Each call is a transaction.
CREATE OR REPLACE FUNCTION embedline.claim_batch(
    pipeline_name text,
    version integer DEFAULT NULL,
    max_rows integer DEFAULT NULL,
    max_tokens integer DEFAULT NULL,
    max_requests integer DEFAULT NULL
)
RETURNS TABLE (state text, claim bigint, fence integer, texts text [])
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
    return calls.claim_batch(plpy, GD, pipeline_name, version, max_rows, max_tokens, max_requests)
$python$;

COMMENT ON FUNCTION embedline.claim_batch(text, integer, integer, integer, integer) IS 'Claim texts to embed, for a remote worker. Each row is one request. A row without a claim says in state: ask again at once (claimed), ask again (idle), nothing waits (empty), end (stop).';
