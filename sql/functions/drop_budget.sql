-- Remove the budgets of a pipeline or a model.
CREATE OR REPLACE FUNCTION embedline.drop_budget(
    pipeline text DEFAULT NULL,
    model text DEFAULT NULL,
    period text DEFAULT NULL
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.spending import budgets
    budgets.drop_budget(plpy, GD, pipeline, model, period)
$python$;

COMMENT ON FUNCTION embedline.drop_budget(text, text, text) IS 'Remove the budgets of a pipeline or a model, of one period or all.';
