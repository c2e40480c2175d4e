-- Count a version's chunks, vectors and dead letters, for embedline.versions. It reads the indexes of both keys.
-- The counting is rolled back, because one transaction cannot hold the locks of 1,000 pipelines' tables and indexes.
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
    chunks := 0;
    vectors := 0;
    dead_letters := 0;
    accepted := 0;
    -- A dead letter is obsolete once its chunk is gone, with its row or with its text.
    EXECUTE format(
        'SELECT (SELECT count(*) FROM embedline_data.%1$I), (SELECT count(*) FROM embedline_data.%2$I),'
        ' count(*), count(d.accepted_by) FROM embedline.version_dead_letter AS d'
        ' WHERE d.version_id = $1 AND EXISTS (SELECT FROM embedline_data.%1$I AS c WHERE c.chunk_id = d.chunk_id)',
        pipeline_name || CASE WHEN set_number = 1 THEN '_chunk' ELSE '_chunk_' || set_number END,
        pipeline_name || '_v' || version_number
    ) INTO chunks, vectors, dead_letters, accepted USING counted_version_id;
    RAISE EXCEPTION USING ERRCODE = 'EL000';
EXCEPTION
    WHEN SQLSTATE 'EL000' OR undefined_table THEN
        -- The counts are done, or another session is dropping the version.
        RETURN NEXT;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._version_counts(text, integer, integer, bigint) IS 'Internal: count a version''s tables.';
