-- List the models that rest, and those whose providers failed requests within the last minute.
CREATE OR REPLACE FUNCTION embedline._provider_alerts()
RETURNS TABLE (severity text, alert text, subject text, since timestamptz, message text, remedy text)
LANGUAGE plpgsql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $plpgsql$
#variable_conflict use_column
BEGIN
    -- A session keeps the plan of this query; LANGUAGE sql would make it for each call, which takes 5 to 30 ms.
    RETURN QUERY
    WITH recent AS (
        SELECT v.model_id, sum(b.request_count) AS requests,
            sum(coalesce((b.failures ->> 'rate_limited')::bigint, 0)) AS limited,
            sum(
                coalesce((b.failures ->> 'server_error')::bigint, 0) + coalesce((b.failures ->> 'unreachable')::bigint, 0)
                + coalesce((b.failures ->> 'invalid_answer')::bigint, 0)
            ) AS failed
        FROM embedline.finished_batch AS b INNER JOIN embedline.version AS v ON v.version_id = b.version_id
        WHERE b.finished_at > clock_timestamp() - interval '60 seconds' AND b.request_count > 0
        GROUP BY v.model_id
    )

    SELECT 'critical', 'circuit_open', m.name, NULL::timestamptz,
        format('the model rests until %s: %s', date_trunc('second', c.open_until), embedline._shown_error(c.last_error)),
        format('SELECT embedline.resume_model(%L);', m.name)
    FROM embedline.circuit AS c INNER JOIN embedline.model AS m ON m.model_id = c.model_id
    WHERE c.failure_count > 0 AND c.open_until > clock_timestamp() - interval '10 seconds'
    UNION ALL
    SELECT 'warning', 'rate_limited', m.name, NULL,
        coalesce(
            'the provider refused ' || r.limited || ' of ' || r.requests || ' requests of the last minute by its rate limit',
            embedline._shown_error(c.last_error)
        ),
        format(
            'SELECT embedline.set_rate_limit(%L, requests_per_minute => %s);', m.name,
            coalesce(greatest(r.requests - r.limited, 1), 60)
        )
    FROM embedline.model AS m
    LEFT JOIN recent AS r ON r.model_id = m.model_id
    LEFT JOIN embedline.circuit AS c ON c.model_id = m.model_id AND c.open_until > clock_timestamp() - interval '10 seconds'
    WHERE (r.limited >= 3 AND r.limited >= 0.1 * r.requests) OR c.last_error LIKE '%HTTP status 429%'
    UNION ALL
    SELECT 'warning', 'provider_failing', m.name, NULL,
        format('%s of %s requests of the last minute failed by the provider''s fault', r.failed, r.requests),
        'SELECT * FROM embedline.batch WHERE failures IS NOT NULL LIMIT 10;'
    FROM recent AS r INNER JOIN embedline.model AS m ON m.model_id = r.model_id
    WHERE r.failed >= 3 AND r.failed >= 0.1 * r.requests
    ;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._provider_alerts() IS 'Internal: list the models whose providers fail.';
