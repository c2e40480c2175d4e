-- Run a statement that changes a source, such as a new column type or DROP COLUMN. In the same transaction the views
-- of its pipelines, and those built on them, are dropped before it and recreated after it.
-- Not SECURITY DEFINER and without a SET clause, because the statement runs with its caller's rights and search_path.
CREATE OR REPLACE FUNCTION embedline.alter_source(source regclass, statement text)
RETURNS void
LANGUAGE plpgsql
VOLATILE
AS $plpgsql$
DECLARE
    -- The statement may give the table another name.
    source_number pg_catalog.int8 := source::pg_catalog.oid::pg_catalog.int8;
BEGIN
    PERFORM embedline._take_away(source);
    EXECUTE statement;
    PERFORM embedline._put_back(source_number);
END
$plpgsql$;

COMMENT ON FUNCTION embedline.alter_source(regclass, text) IS 'Run a statement that changes a source. Views that block it are dropped and recreated.';
