-- Limit the spending of a pipeline or a model per day or month, in tokens, money or both.
CREATE OR REPLACE FUNCTION embedline.set_budget(
    period text,
    pipeline text DEFAULT NULL,
    model text DEFAULT NULL,
    tokens bigint DEFAULT NULL,
    money numeric DEFAULT NULL
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.spending import budgets
    budgets.set_budget(plpy, GD, period, pipeline, model, tokens, money)
$python$;

COMMENT ON FUNCTION embedline.set_budget(text, text, text, bigint, numeric) IS 'Limit the spending of a pipeline or a model in each day or month (UTC). Replaces the earlier budget of that period.';
