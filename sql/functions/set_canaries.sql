-- Copy the labelled queries of a table, which check_quality asks from then on. Locks: none beyond reading.
-- Runs with the caller's rights, as evaluate does: the table and the source are read as the caller may.
CREATE OR REPLACE FUNCTION embedline.set_canaries(pipeline_name text, canaries regclass)
RETURNS integer
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.observe import labelled_queries
    return labelled_queries.set_canaries(plpy, GD, pipeline_name, canaries)
$python$;

COMMENT ON FUNCTION embedline.set_canaries(text, regclass) IS 'Copy the canaries of a table (query, key, grade), which check_quality asks from then on; returns the number of queries. NULL as table removes them.';
