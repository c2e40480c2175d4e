-- The statement that builds the vector index where pg_cron cannot: CONCURRENTLY cannot run in a function.
CREATE OR REPLACE FUNCTION embedline.index_statement(pipeline_name text)
RETURNS text
LANGUAGE plpython3u
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline import indexing
    return indexing.index_statement(plpy, GD, pipeline_name)
$python$;

COMMENT ON FUNCTION embedline.index_statement(text) IS 'Return the CREATE INDEX CONCURRENTLY of a pipeline, NULL where its index is valid or it has none.';
