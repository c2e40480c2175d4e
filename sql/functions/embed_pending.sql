-- Embed up to max_rows changed rows; returns how many were embedded.
CREATE OR REPLACE FUNCTION embedline.embed_pending(max_rows integer DEFAULT 1000, pipeline_name text DEFAULT NULL)
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
    from embedline.worker import embed_pending
    return embed_pending.embed_pending(plpy, GD, max_rows, pipeline_name)
$python$;

COMMENT ON FUNCTION embedline.embed_pending(integer, text) IS 'Embed up to max_rows changed rows in this transaction, live changes first, then backfill. Returns the number of source rows embedded.';
