-- Sum up the ledger by day, model and pipeline. The nightly job calls it, and workers from time to time.
CREATE OR REPLACE FUNCTION embedline._roll_up_usage()
RETURNS bigint
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.spending import ledger
    return ledger.roll_up_usage(plpy, GD)
$python$;

COMMENT ON FUNCTION embedline._roll_up_usage() IS 'Internal: sum up reservations older than two minutes by day, and return how many.';
