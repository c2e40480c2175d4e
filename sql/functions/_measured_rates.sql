-- Return the speed of each model. It is from the ledger of the last 30 days, else from estimate's last measurement on
-- this machine.
CREATE OR REPLACE FUNCTION embedline._measured_rates()
RETURNS TABLE (model_id bigint, tokens_per_second double precision, origin text)
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH spent AS (
        SELECT d.model_id, d.tokens - d.batch_tokens AS tokens, d.busy_seconds FROM embedline.usage_day AS d
        WHERE d.day > (now() AT TIME ZONE 'UTC')::date - 30
        UNION ALL
        SELECT r.model_id, sum(r.tokens), (
            SELECT sum(extract(epoch FROM upper(b.span) - lower(b.span)))
            FROM unnest(range_agg(tstzrange(r.reserved_at, greatest(r.settled_at, r.reserved_at), '[]'))) AS b (span))
        FROM embedline.reservation AS r WHERE r.settled_at IS NOT NULL AND NOT r.is_batch GROUP BY r.model_id
    ), ledger AS (
        SELECT s.model_id, (sum(s.tokens) / sum(s.busy_seconds))::double precision AS tokens_per_second
        FROM spent AS s GROUP BY s.model_id HAVING sum(s.busy_seconds) > 0
    )
    SELECT m.model_id, coalesce(l.tokens_per_second, r.tokens_per_second),
        CASE WHEN l.model_id IS NOT NULL THEN 'ledger' ELSE 'measured' END
    FROM embedline.model AS m
    LEFT JOIN ledger AS l ON l.model_id = m.model_id
    LEFT JOIN embedline.model_rate AS r ON r.model_id = m.model_id
    WHERE l.model_id IS NOT NULL OR r.model_id IS NOT NULL;
$sql$;

COMMENT ON FUNCTION embedline._measured_rates() IS 'Internal: return the tokens per second of each measured model.';
