-- Watch another table of the same key and columns, which has replaced the source or will.
-- Locks: SHARE ROW EXCLUSIVE on the new table, then ACCESS EXCLUSIVE on the old one and the views until the commit.
CREATE OR REPLACE FUNCTION embedline.move_pipeline(name text, new_source regclass)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Generated code must not depend on the session.
SET quote_all_identifiers = off
SET standard_conforming_strings = on
AS $python$
    from embedline.pipelines import move
    move.move_pipeline(plpy, GD, name, new_source)
$python$;

COMMENT ON FUNCTION embedline.move_pipeline(text, regclass) IS 'Watch another table of the same key and columns. Rows that are the same there are not embedded again.';
