-- What a version has and lacks, counted in its tables, for embedline.versions. Cost: it reads both keys' indexes.
CREATE OR REPLACE FUNCTION embedline._version_counts(
    pipeline_name text,
    version_number integer,
    set_number integer,
    counted_version_id bigint
)
RETURNS TABLE (chunks bigint, vectors bigint, dead_letters bigint, accepted bigint)
LANGUAGE plpgsql
STABLE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- A dead letter whose chunk is gone, with its row or with the words it was made of, says nothing any more.
    RETURN QUERY EXECUTE format(
        'SELECT (SELECT count(*) FROM embedline_data.%1$I), (SELECT count(*) FROM embedline_data.%2$I),'
        ' count(*), count(d.accepted_by) FROM embedline.version_dead_letter AS d'
        ' WHERE d.version_id = $1 AND EXISTS (SELECT FROM embedline_data.%1$I AS c WHERE c.chunk_id = d.chunk_id)',
        pipeline_name || CASE WHEN set_number = 1 THEN '_chunk' ELSE '_chunk_' || set_number END,
        pipeline_name || '_v' || version_number
    ) USING counted_version_id;
EXCEPTION WHEN undefined_table THEN
    -- A version that is being dropped in another session.
    RETURN QUERY SELECT 0::bigint, 0::bigint, 0::bigint, 0::bigint;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._version_counts(text, integer, integer, bigint) IS 'Internal: counts of a version''s tables.';
