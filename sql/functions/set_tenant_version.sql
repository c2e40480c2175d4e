-- Have a version answer a tenant's search calls, before the cutover of the others or after it.
CREATE OR REPLACE FUNCTION embedline.set_tenant_version(pipeline_name text, tenant text, version_number integer)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.versions import traffic
    return traffic.set_tenant_version(plpy, GD, pipeline_name, tenant, version_number)
$python$;

COMMENT ON FUNCTION embedline.set_tenant_version(text, text, integer) IS 'Have a complete version answer search(..., tenant => ...) of one tenant. NULL as version returns the tenant to the version that serves all.';
