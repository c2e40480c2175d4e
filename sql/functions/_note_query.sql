-- Note the text of a search, if its pipeline has that switched on. Only search calls it. It does not wait for a lock.
CREATE OR REPLACE FUNCTION embedline._note_query(pipeline_id bigint, query text)
RETURNS void
LANGUAGE sql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '1ms'
AS $sql$
    -- Without a worker and a nightly run only searches remove what is over its retention.
    DELETE FROM embedline.query_sample AS s WHERE s.ctid = ANY(ARRAY(
        SELECT o.ctid FROM embedline.query_sample AS o
        INNER JOIN embedline.pipeline AS p ON p.pipeline_id = o.pipeline_id
        WHERE o.pipeline_id = $1 AND o.asked_at < clock_timestamp() - p.query_retention
        LIMIT 100 FOR UPDATE OF o SKIP LOCKED
    ));
    INSERT INTO embedline.query_sample (pipeline_id, query)
    SELECT p.pipeline_id, left($2, 10000) FROM embedline.pipeline AS p
    WHERE p.pipeline_id = $1 AND p.query_sample_share > 0;
$sql$;

COMMENT ON FUNCTION embedline._note_query(bigint, text) IS 'Internal: add a row to embedline.query_sample.';
