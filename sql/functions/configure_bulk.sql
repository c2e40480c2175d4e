-- Say which changes may wait for the batch endpoint of the provider: large ones, and those of a window of the day.
CREATE OR REPLACE FUNCTION embedline.configure_bulk(
    pipeline_name text,
    bulk_rows integer DEFAULT NULL,
    window_start time DEFAULT NULL,
    window_end time DEFAULT NULL
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.pipelines import bulk
    return bulk.configure_bulk(plpy, GD, pipeline_name, bulk_rows, window_start, window_end)
$python$;

COMMENT ON FUNCTION embedline.configure_bulk(text, integer, time, time) IS 'Let changes of more than bulk_rows rows in one transaction, and those made from window_start to window_end (UTC), wait for the provider''s batch endpoint. Without both, only backfills wait.';
