-- What waits in a pipeline's generated tables, for embedline.status. Counts the outbox: cost grows with the backlog.
CREATE OR REPLACE FUNCTION embedline._pipeline_counts(pipeline_name text)
RETURNS TABLE (pending bigint, oldest_enqueued_at timestamptz, last_row_error text)
LANGUAGE plpgsql
STABLE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT count(*), min(o.enqueued_at), (array_agg(o.last_error ORDER BY o.outbox_id) '
        'FILTER (WHERE o.last_error IS NOT NULL))[1] FROM embedline_data.%I AS o',
        pipeline_name || '_outbox'
    );
EXCEPTION WHEN undefined_table THEN
    -- A pipeline that is being dropped in another session.
    RETURN QUERY SELECT 0::bigint, NULL::timestamptz, NULL::text;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._pipeline_counts(text) IS 'Internal: counts of a pipeline''s outbox.';
