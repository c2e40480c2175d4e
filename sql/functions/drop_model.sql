-- Forget a model that no pipeline uses.
CREATE OR REPLACE FUNCTION embedline.drop_model(name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.models import register
    register.drop_model(plpy, GD, name)
$python$;

COMMENT ON FUNCTION embedline.drop_model(text) IS 'Forget a model that no pipeline uses.';
