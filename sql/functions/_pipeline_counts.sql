-- What waits in a pipeline's generated tables, for embedline.status. Counts the queue: cost grows with the backlog.
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
        'SELECT q.n + i.n + d.n + c.n, least(q.oldest, i.oldest, d.oldest, c.oldest), q.error FROM ('
        'SELECT count(*) AS n, min(o.enqueued_at) AS oldest, (array_agg(o.last_error ORDER BY o.outbox_id) '
        'FILTER (WHERE o.last_error IS NOT NULL))[1] AS error FROM embedline_data.%1$I AS o) AS q, ('
        'SELECT coalesce(sum(cardinality(n.%2$I)), 0)::bigint AS n, min(n.enqueued_at) AS oldest '
        'FROM embedline_data.%3$I AS n) AS i, ('
        'SELECT coalesce(sum(cardinality(n.%2$I)), 0)::bigint AS n, min(n.enqueued_at) AS oldest '
        'FROM embedline_data.%4$I AS n) AS c, ('
        'SELECT coalesce(sum(cardinality(n.%2$I)), 0)::bigint AS n, min(n.enqueued_at) AS oldest '
        'FROM embedline_data.%5$I AS n) AS d',
        pipeline_name || '_outbox',
        (SELECT p.key_columns[1] FROM embedline.pipeline AS p WHERE p.name = pipeline_name),
        pipeline_name || '_inbox',
        pipeline_name || '_claim',
        pipeline_name || '_deleted'
    );
EXCEPTION WHEN undefined_table THEN
    -- A pipeline that is being dropped in another session.
    RETURN QUERY SELECT 0::bigint, NULL::timestamptz, NULL::text;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._pipeline_counts(text) IS 'Internal: counts of a pipeline''s queue.';
