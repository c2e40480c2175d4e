-- Store what a model's provider takes for a million tokens.
CREATE OR REPLACE FUNCTION embedline.set_price(model text, price_per_million_tokens numeric)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.spending import budgets
    budgets.set_price(plpy, GD, model, price_per_million_tokens)
$python$;

COMMENT ON FUNCTION embedline.set_price(text, numeric) IS 'Store what the provider of a model takes for a million tokens; NULL: not known.';
