-- Return the metrics of this database as text that Prometheus reads, and note since when alerts stand.
-- SECURITY DEFINER, because a reader may not name the schema of the generated tables.
CREATE OR REPLACE FUNCTION embedline.metrics()
RETURNS text
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $python$
    from embedline.observe import metrics
    return metrics.metrics(plpy, GD)
$python$;

COMMENT ON FUNCTION embedline.metrics() IS 'Return the metrics of this database in Prometheus'' text format.';
