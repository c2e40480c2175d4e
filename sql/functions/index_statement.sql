-- The statement that builds an index of a version where pg_cron cannot: CONCURRENTLY cannot run in a function.
-- The serving version and the column's own index where nothing else is named.
CREATE OR REPLACE FUNCTION embedline.index_statement(
    pipeline_name text, version_number integer DEFAULT NULL, precision_name text DEFAULT NULL
)
RETURNS text
LANGUAGE plpython3u
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.indexes import build
    return build.index_statement(plpy, GD, pipeline_name, version_number, precision_name)
$python$;

COMMENT ON FUNCTION embedline.index_statement(text, integer, text) IS 'Return the CREATE INDEX CONCURRENTLY of a version, NULL where its index is valid or it has none.';
