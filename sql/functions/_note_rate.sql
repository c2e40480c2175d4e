-- Store estimate's measurement of a local model, so that it can be compared with others later.
CREATE OR REPLACE FUNCTION embedline._note_rate(model_name text, tokens_per_second double precision)
RETURNS void
LANGUAGE sql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO embedline.model_rate (model_id, tokens_per_second)
    SELECT m.model_id, $2 FROM embedline.model AS m WHERE m.name = $1
    ON CONFLICT (model_id)
        DO UPDATE SET tokens_per_second = excluded.tokens_per_second, measured_at = excluded.measured_at;
$sql$;

COMMENT ON FUNCTION embedline._note_rate(text, double precision) IS 'Internal: store the measured speed of a model.';
