-- Drop the objects that block a change of a source, until _put_back in the same transaction.
CREATE OR REPLACE FUNCTION embedline._take_away(source regclass)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Generated code must not depend on the session.
SET quote_all_identifiers = off
SET standard_conforming_strings = on
AS $python$
    from embedline.pipelines import alter_source
    alter_source.take_away(plpy, GD, source)
$python$;

COMMENT ON FUNCTION embedline._take_away(regclass) IS 'Internal: first half of alter_source.';
