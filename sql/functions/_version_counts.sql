-- What a version has and lacks, counted in its tables, for embedline.versions. Cost: it reads both keys' indexes.
CREATE OR REPLACE FUNCTION embedline._version_counts(pipeline_name text, version_number integer, set_number integer)
RETURNS TABLE (chunks bigint, vectors bigint)
LANGUAGE plpgsql
STABLE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT (SELECT count(*) FROM embedline_data.%I), (SELECT count(*) FROM embedline_data.%I)',
        pipeline_name || CASE WHEN set_number = 1 THEN '_chunk' ELSE '_chunk_' || set_number END,
        pipeline_name || '_v' || version_number
    );
EXCEPTION WHEN undefined_table THEN
    -- A version that is being dropped in another session.
    RETURN QUERY SELECT 0::bigint, 0::bigint;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._version_counts(text, integer, integer) IS 'Internal: counts of a version''s tables.';
