-- Close the circuit of a model whose provider failed or asked to wait.
CREATE OR REPLACE FUNCTION embedline.resume_model(name text)
RETURNS bigint
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.models import circuit
    return circuit.resume_model(plpy, GD, name)
$python$;

COMMENT ON FUNCTION embedline.resume_model(text) IS 'Close a model''s circuit now, and return how many rows and chunks no longer wait for their retry.';
