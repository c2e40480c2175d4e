-- Limit the requests and tokens that all workers together send to a model per minute.
CREATE OR REPLACE FUNCTION embedline.set_rate_limit(
    model text,
    requests_per_minute integer DEFAULT NULL,
    tokens_per_minute bigint DEFAULT NULL
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.spending import rate_limits
    rate_limits.set_rate_limit(plpy, GD, model, requests_per_minute, tokens_per_minute)
$python$;

COMMENT ON FUNCTION embedline.set_rate_limit(text, integer, bigint) IS 'Limit the requests and tokens that all workers together send to a model per minute. If both are NULL, there is no limit.';
