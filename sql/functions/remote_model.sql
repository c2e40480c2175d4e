-- Return what a remote worker needs to know of the model that it embeds with: no key, only the name of its variable.
CREATE OR REPLACE FUNCTION embedline.remote_model(pipeline_name text, version integer DEFAULT NULL)
RETURNS jsonb
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.worker.remote import calls
    return calls.remote_model(plpy, GD, pipeline_name, version)
$python$;

COMMENT ON FUNCTION embedline.remote_model(text, integer) IS 'The model of a pipeline''s version (NULL: the serving one), for a remote worker, and how many rows or chunks wait.';
