-- Restore the objects that _take_away dropped for a source in this transaction.
CREATE OR REPLACE FUNCTION embedline._put_back(source_number bigint)
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
    alter_source.put_back(plpy, GD, source_number)
$python$;

COMMENT ON FUNCTION embedline._put_back(bigint) IS 'Internal: second half of alter_source.';
