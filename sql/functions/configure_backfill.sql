-- Set the order and the speed in which a version is filled, from the next claim on.
CREATE OR REPLACE FUNCTION embedline.configure_backfill(
    pipeline_name text,
    version_number integer,
    backfill_order text DEFAULT NULL,
    backfill_rate integer DEFAULT NULL
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.versions import fill
    return fill.configure_backfill(plpy, GD, pipeline_name, version_number, backfill_order, backfill_rate)
$python$;

COMMENT ON FUNCTION embedline.configure_backfill(text, integer, text, integer) IS 'Fill a version oldest_first or newest_first (NULL: as before), with at most backfill_rate chunks per second (NULL: no limit).';
