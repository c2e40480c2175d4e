-- Count the finished and the waiting rows of a pipeline, for embedline.estimate.
CREATE OR REPLACE FUNCTION embedline._work_done(pipeline_name text)
RETURNS TABLE (documents bigint, pending bigint)
LANGUAGE plpgsql
STABLE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT (SELECT count(*) FROM embedline_data.%I), c.pending FROM embedline._pipeline_counts($1) AS c',
        pipeline_name || '_document'
    ) USING pipeline_name;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._work_done(text) IS 'Internal: count the finished rows and the waiting changes of a pipeline.';
