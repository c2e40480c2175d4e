-- Have search rank a version with one of its shadow indexes; NULL selects the index of the column itself.
CREATE OR REPLACE FUNCTION embedline.use_precision(pipeline_name text, version_number integer, name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.indexes import precision
    precision.use_precision(plpy, GD, pipeline_name, version_number, name)
$python$;

COMMENT ON FUNCTION embedline.use_precision(text, integer, text) IS 'Have search rank a version with one of its shadow indexes; NULL selects its own index.';
