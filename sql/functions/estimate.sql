-- Estimate the cost of embedding a pipeline or a table: rows, tokens, money, bytes, hours. Runs with the caller's
-- rights.
CREATE OR REPLACE FUNCTION embedline.estimate(
    pipeline_or_table text,
    model text DEFAULT NULL,
    content text DEFAULT NULL,
    sample_rows integer DEFAULT 1000,
    expression_search_path text DEFAULT current_setting('search_path')
)
RETURNS TABLE (figure text, value numeric, low numeric, high numeric, unit text, note text)
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
-- The text of the generated functions must not depend on the session.
SET quote_all_identifiers = off
AS $python$
    from embedline.estimate import estimate
    return estimate.estimate(plpy, GD, pipeline_or_table, model, content, sample_rows, expression_search_path)
$python$;

COMMENT ON FUNCTION embedline.estimate(text, text, text, integer, text) IS 'Estimate rows, chunks, tokens, money, bytes and hours of embedding a pipeline or a table, with 95 % intervals. Makes no paid call.';
