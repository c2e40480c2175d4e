-- One row per budget and unit: the amounts spent and left, and the start of the next period. Reserving reads it, too.
CREATE OR REPLACE VIEW embedline.budget AS
SELECT
    CASE WHEN c.pipeline_id IS NULL THEN 'model' ELSE 'pipeline' END AS scope,
    coalesce(p.name, m.name) AS name,
    c.period,
    c.unit,
    c.amount,
    d.amount + r.settled AS spent,
    r.reserved,
    s.remaining,
    w.starts_at,
    w.resets_at,
    CASE
        WHEN s.remaining <= 0 THEN 'exhausted'
        WHEN EXISTS (
            SELECT FROM embedline.budget_stop AS t
            INNER JOIN embedline.version AS v ON t.pipeline_id = v.pipeline_id
            INNER JOIN embedline.model AS tm ON v.model_id = tm.model_id
            WHERE
                (t.pipeline_id = c.pipeline_id OR v.model_id = c.model_id) AND t.stopped_at >= w.starts_at
                AND t.tokens * CASE c.unit WHEN 'tokens' THEN 1 ELSE tm.price_per_million_tokens / 1000000 END
                > s.remaining
        ) THEN 'exhausted'
        ELSE 'open'
    END AS state
FROM embedline.spending_cap AS c
LEFT JOIN embedline.pipeline AS p ON c.pipeline_id = p.pipeline_id
LEFT JOIN embedline.model AS m ON c.model_id = m.model_id
CROSS JOIN LATERAL ( -- noqa: ST05
    SELECT
        date_trunc(c.period, clock_timestamp(), 'UTC') AS starts_at,
        (date_trunc(c.period, clock_timestamp() AT TIME ZONE 'UTC') + ('1 ' || c.period)::interval)
        AT TIME ZONE 'UTC' AS resets_at
) AS w
CROSS JOIN LATERAL (
    SELECT coalesce(sum(CASE c.unit WHEN 'tokens' THEN u.tokens ELSE u.money END), 0) AS amount
    FROM embedline.usage_day AS u
    WHERE
        u.day >= (w.starts_at AT TIME ZONE 'UTC')::date
        AND (u.pipeline_id = c.pipeline_id OR u.model_id = c.model_id)
) AS d
CROSS JOIN LATERAL (
    SELECT
        coalesce(sum(a.amount) FILTER (WHERE u.settled_at IS NOT NULL), 0) AS settled,
        coalesce(sum(a.amount) FILTER (WHERE u.settled_at IS NULL), 0) AS reserved
    FROM embedline.reservation AS u
    CROSS JOIN LATERAL (
        SELECT CASE c.unit WHEN 'tokens' THEN u.tokens ELSE u.tokens * u.price / 1000000 END AS amount
    ) AS a
    WHERE u.reserved_at >= w.starts_at AND (u.pipeline_id = c.pipeline_id OR u.model_id = c.model_id)
) AS r
CROSS JOIN LATERAL (SELECT c.amount - d.amount - r.settled - r.reserved AS remaining) AS s; -- noqa: ST05

COMMENT ON VIEW embedline.budget IS 'Budgets of pipelines and models by day or month (UTC), each with the amounts spent and left.';
COMMENT ON COLUMN embedline.budget.spent IS 'Spent on answered requests';
COMMENT ON COLUMN embedline.budget.reserved IS 'Reserved for requests in flight, or whose worker died; counted as estimated';
COMMENT ON COLUMN embedline.budget.remaining IS 'Amount left; below 0 if the provider counted more than was estimated';
COMMENT ON COLUMN embedline.budget.state IS
'open, or exhausted if nothing is left, or less than the next request needs. Work goes on at resets_at, or once set_budget or drop_budget leaves more';
