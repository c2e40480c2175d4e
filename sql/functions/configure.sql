-- Set one setting of the workers, or reset it with NULL; returns its value.
CREATE OR REPLACE FUNCTION embedline.configure(setting text, value double precision DEFAULT NULL)
RETURNS double precision
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.catalog import settings
    return settings.configure(plpy, GD, setting, value)
$python$;

COMMENT ON FUNCTION embedline.configure(text, double precision) IS 'Set one of batch_seconds, commit_seconds, min_rows, max_rows, live_share, max_replication_lag_seconds, max_xmin_age; NULL sets the default. Workers follow within a second.';
