-- Let remote workers of a role have a pipeline's texts.
-- SECURITY DEFINER, because a source's owner may not write to the catalogue.
CREATE OR REPLACE FUNCTION embedline.grant_remote(
    pipeline_name text, role_name name, is_exclusive boolean DEFAULT FALSE
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.worker.remote import grants
    return grants.grant_remote(plpy, GD, pipeline_name, role_name, is_exclusive)
$python$;

COMMENT ON FUNCTION embedline.grant_remote(text, name, boolean) IS 'Let remote workers of a role have the texts of a pipeline. is_exclusive: workers in the database leave the embedding to them.';
