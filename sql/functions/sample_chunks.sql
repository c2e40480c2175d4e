-- Cut a sample of a pipeline's rows as its workers would. Asks no model. Runs with the caller's rights.
CREATE OR REPLACE FUNCTION embedline.sample_chunks(pipeline_name text, sample_rows integer DEFAULT 1000)
RETURNS TABLE (chunk text, prefix text)
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
-- The text of the generated functions must not depend on the session.
SET quote_all_identifiers = off
AS $python$
    from embedline.estimate import sample_chunks
    return sample_chunks.sample_chunks(plpy, GD, pipeline_name, sample_rows)
$python$;

COMMENT ON FUNCTION embedline.sample_chunks(text, integer) IS 'Return the chunks of a sample of rows, cut as the pipeline cuts them; rows of more than 10,000 characters are left out.';
