-- Embed texts with a version's model, and compare the vectors with those given. Locks: none beyond reading.
-- SECURITY DEFINER: the ledger of what is spent is not for callers; the right to change the pipeline is checked.
CREATE OR REPLACE FUNCTION embedline.check_vectors(
    pipeline_name text,
    version integer,
    texts text [],
    vectors bytea []
)
RETURNS TABLE (
    compared integer,
    of_another_model integer,
    lowest_cosine double precision,
    required_cosine double precision
)
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.verify import check_vectors
    return check_vectors.check_vectors(plpy, GD, pipeline_name, version, texts, vectors)
$python$;

COMMENT ON FUNCTION embedline.check_vectors(text, integer, text [], bytea []) IS 'Embed texts with the model of a version, and compare the vectors with those given, in the form of vector_send or halfvec_send.';
