-- Return the state of an index of embedline_data: missing, building, invalid, valid. All callers that show the state
-- or act on it use this function. A build reports its index once that is in the catalogue; for an instant before, only
-- the table.
-- SECURITY DEFINER, because a reader may not name the schema, and builds of other roles are hidden from all but
-- superusers.
CREATE OR REPLACE FUNCTION embedline._index_state(index_name text)
RETURNS text
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT coalesce((
        SELECT CASE
            WHEN i.indisvalid THEN 'valid'
            WHEN EXISTS (
                SELECT FROM pg_stat_progress_create_index AS b
                WHERE b.index_relid = i.indexrelid OR (b.relid = i.indrelid AND b.index_relid = 0)
            ) THEN 'building'
            ELSE 'invalid'
        END
        FROM pg_class AS c INNER JOIN pg_index AS i ON i.indexrelid = c.oid
        WHERE c.relname = index_name AND c.relnamespace = 'embedline_data'::regnamespace
    ), 'missing')
$sql$;

COMMENT ON FUNCTION embedline._index_state(text) IS 'Internal: return whether an index is missing, building, invalid or valid.';
