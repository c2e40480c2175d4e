-- Return the statement that builds an index of a version, because CONCURRENTLY cannot run in a function. It serves
-- systems without pg_cron. The defaults are the serving version and the column's own index.
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

COMMENT ON FUNCTION embedline.index_statement(text, integer, text) IS 'Return the CREATE INDEX CONCURRENTLY of a version, NULL if its index is valid or it has none.';
