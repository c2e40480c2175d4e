-- Have a version serve a share of search calls before its cutover, and answer a share of them in the shadow.
CREATE OR REPLACE FUNCTION embedline.set_traffic(
    pipeline_name text,
    version_number integer,
    share double precision DEFAULT 0,
    shadow_share double precision DEFAULT 0
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.versions import traffic
    return traffic.set_traffic(plpy, GD, pipeline_name, version_number, share, shadow_share)
$python$;

COMMENT ON FUNCTION embedline.set_traffic(text, integer, double precision, double precision) IS 'Have a complete version serve this share of search calls, sticky by tenant, session_key or session. For shadow_share of them embedline.shadow_read records how both compare; NULL as version ends both.';
