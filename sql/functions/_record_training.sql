-- Note what a model was trained on. Only embedline finetune calls it, in the transaction that registers the model.
CREATE OR REPLACE FUNCTION embedline._record_training(model_name text, training jsonb, pairs jsonb)
RETURNS bigint
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.gate import record_training
    return record_training.record_training(plpy, GD, model_name, training, pairs)
$python$;

COMMENT ON FUNCTION embedline._record_training(text, jsonb, jsonb) IS 'Internal: note what a model was trained on.';
