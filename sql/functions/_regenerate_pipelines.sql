-- Recreate the generated functions of existing pipelines if this version of Embedline has others.
CREATE OR REPLACE FUNCTION embedline._regenerate_pipelines()
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Generated code must not depend on the session.
SET quote_all_identifiers = off
SET standard_conforming_strings = on
AS $python$
    from embedline.pipelines import regenerate
    regenerate.regenerate_pipelines(plpy, GD)
$python$;

COMMENT ON FUNCTION embedline._regenerate_pipelines() IS 'Internal: last step of an upgrade.';
