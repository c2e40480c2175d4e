-- The metered requests to providers by day (UTC), model and pipeline.
CREATE OR REPLACE VIEW embedline.usage AS
SELECT
    u.day,
    coalesce(m.name, 'model ' || u.model_id || ', dropped') AS model,
    CASE WHEN u.pipeline_id <> 0 THEN coalesce(p.name, 'pipeline ' || u.pipeline_id || ', dropped') END AS pipeline,
    sum(u.requests)::bigint AS requests,
    sum(u.tokens)::bigint AS tokens,
    sum(u.reserved_tokens)::bigint AS reserved_tokens,
    sum(u.money) AS money
FROM (
    SELECT
        d.day,
        d.model_id,
        d.pipeline_id,
        d.requests,
        d.tokens,
        0 AS reserved_tokens,
        d.money
    FROM embedline.usage_day AS d
    UNION ALL
    SELECT
        (r.reserved_at AT TIME ZONE 'UTC')::date AS day,
        r.model_id,
        r.pipeline_id,
        r.requests,
        r.tokens,
        CASE WHEN r.settled_at IS NULL THEN r.tokens ELSE 0 END AS reserved_tokens,
        coalesce(r.tokens * r.price, 0) / 1000000 AS money
    FROM embedline.reservation AS r
) AS u
LEFT JOIN embedline.model AS m ON u.model_id = m.model_id
LEFT JOIN embedline.pipeline AS p ON u.pipeline_id = p.pipeline_id
GROUP BY u.day, u.model_id, u.pipeline_id, m.name, p.name;

COMMENT ON VIEW embedline.usage IS 'Requests, tokens and money by day (UTC), model and pipeline. Queries of embedline.search are not among them.';
COMMENT ON COLUMN embedline.usage.pipeline IS 'NULL: embedline.rerank was called for none';
COMMENT ON COLUMN embedline.usage.tokens IS 'As the provider counted them, or as estimated if it did not';
COMMENT ON COLUMN embedline.usage.reserved_tokens IS 'Those of these tokens whose requests are not answered';
