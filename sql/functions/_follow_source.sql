-- Write a pipeline's trigger functions anew with the names that the key columns have now.
CREATE OR REPLACE FUNCTION embedline._follow_source(pipeline_name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline import pipelines
    pipelines.follow_source(plpy, GD, pipeline_name)
$python$;

COMMENT ON FUNCTION embedline._follow_source(text) IS 'Internal: follow a renamed key column; called by the event trigger.';
