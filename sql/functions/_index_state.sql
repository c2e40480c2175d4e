-- Return the state of an index of embedline_data: missing, building, invalid, valid. All callers that show the state
-- or act on it use this function. A build reports its index once that is in the catalogue; for an instant before, only
-- the table.
-- SECURITY DEFINER, because a reader may not name the schema, and builds of other roles are hidden from all but
-- superusers. PL/pgSQL, because each search asks: a session plans it once, and a call takes 0.06 ms on two busy cores.
-- An SQL function is planned at each call.
CREATE OR REPLACE FUNCTION embedline._index_state(index_name text)
RETURNS text
LANGUAGE plpgsql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    found_index record;
BEGIN
    SELECT i.indisvalid, i.indexrelid, i.indrelid INTO found_index
    FROM pg_class AS c INNER JOIN pg_index AS i ON i.indexrelid = c.oid
    WHERE c.relname = index_name AND c.relnamespace = 'embedline_data'::regnamespace;
    IF NOT FOUND THEN
        RETURN 'missing';
    ELSIF found_index.indisvalid THEN
        RETURN 'valid';
    ELSIF EXISTS (
        SELECT FROM pg_stat_progress_create_index AS b
        WHERE b.index_relid = found_index.indexrelid OR (b.relid = found_index.indrelid AND b.index_relid = 0)
    ) THEN
        RETURN 'building';
    END IF;
    RETURN 'invalid';
END
$plpgsql$;

COMMENT ON FUNCTION embedline._index_state(text) IS 'Internal: return whether an index is missing, building, invalid or valid.';
