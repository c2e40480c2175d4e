-- Store a model's price: the cost of a million tokens at its provider.
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

COMMENT ON FUNCTION embedline.set_price(text, numeric) IS 'Store the cost of a million tokens at the model''s provider; NULL if it is not known.';
