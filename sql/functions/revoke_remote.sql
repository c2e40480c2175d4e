-- Take a pipeline's texts from the remote workers of a role. Takes effect at their next claim.
-- SECURITY DEFINER, because a source's owner may not write to the catalogue.
CREATE OR REPLACE FUNCTION embedline.revoke_remote(pipeline_name text, role_name name)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.worker.remote import grants
    return grants.revoke_remote(plpy, GD, pipeline_name, role_name)
$python$;

COMMENT ON FUNCTION embedline.revoke_remote(text, name) IS 'Give remote workers of a role no more texts of a pipeline.';
