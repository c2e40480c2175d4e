-- Lend vectors to the chunks of a version that have the same content, so that the model is not asked for them.
-- SECURITY DEFINER: the tables of what is lent are not for callers; the right to change the pipeline is checked.
CREATE OR REPLACE FUNCTION embedline.add_loan(
    pipeline_name text,
    version integer,
    content_hashes uuid [],
    vectors bytea []
)
RETURNS bigint
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.documents import loans
    return loans.add_loan(plpy, GD, pipeline_name, version, content_hashes, vectors)
$python$;

COMMENT ON FUNCTION embedline.add_loan(text, integer, uuid [], bytea []) IS 'Lend vectors, in the form of vector_send or halfvec_send, to chunks of a version by content hash (NULL: the serving version). Returns how many were new.';
