-- Remove the vectors that were lent to a version. Chunks that have taken one keep it.
-- SECURITY DEFINER: the tables of what is lent are not for callers; the right to change the pipeline is checked.
CREATE OR REPLACE FUNCTION embedline.end_loan(pipeline_name text, version integer DEFAULT NULL)
RETURNS TABLE (lent bigint, taken bigint, chunks bigint, lent_chunks bigint)
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.documents import loans
    return loans.end_loan(plpy, GD, pipeline_name, version)
$python$;

COMMENT ON FUNCTION embedline.end_loan(text, integer) IS 'End a loan: remove the vectors that were lent to a version. Returns how many were lent and taken, how many chunks have a vector, and how many of these a lent one.';
