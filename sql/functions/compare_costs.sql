-- Compare the cost of embedding by a hosted service, by own machines, and by both. Runs with the caller's rights.
CREATE OR REPLACE FUNCTION embedline.compare_costs(
    pipeline_or_table text,
    hosted_model text DEFAULT NULL,
    own_model text DEFAULT NULL,
    machine_price_per_hour numeric DEFAULT NULL,
    documents_per_day numeric DEFAULT 0,
    bulk_share numeric DEFAULT 0,
    batch_discount numeric DEFAULT 0,
    queries_per_second numeric DEFAULT 0,
    tokens_per_query numeric DEFAULT 16,
    search_milliseconds numeric DEFAULT NULL,
    storage_price_per_gigabyte numeric DEFAULT NULL,
    price_per_million_tokens numeric DEFAULT NULL,
    own_tokens_per_second numeric DEFAULT NULL,
    content text DEFAULT NULL,
    sample_rows integer DEFAULT 1000,
    expression_search_path text DEFAULT current_setting('search_path')
)
RETURNS TABLE (way text, figure text, value numeric, low numeric, high numeric, unit text, note text)
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
-- The text of the generated functions must not depend on the session.
SET quote_all_identifiers = off
AS $python$
    from embedline.estimate import compare_costs
    return compare_costs.compare_costs(plpy, GD, pipeline_or_table, {
        "hosted_model": hosted_model, "own_model": own_model, "machine_price_per_hour": machine_price_per_hour,
        "documents_per_day": documents_per_day, "bulk_share": bulk_share, "batch_discount": batch_discount,
        "queries_per_second": queries_per_second, "tokens_per_query": tokens_per_query,
        "search_milliseconds": search_milliseconds, "storage_price_per_gigabyte": storage_price_per_gigabyte,
        "price_per_million_tokens": price_per_million_tokens, "own_tokens_per_second": own_tokens_per_second,
        "content": content, "sample_rows": sample_rows, "expression_search_path": expression_search_path,
    })
$python$;

COMMENT ON FUNCTION embedline.compare_costs(text, text, text, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, text, integer, text) IS 'Compare the cost of embedding a pipeline or a table by a hosted service, by own machines, and by both. Makes no paid call.';
