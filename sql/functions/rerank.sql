-- Score texts for a query with a reranker: one score for each text, in their order. VOLATILE, because a call that costs
-- money is counted.
CREATE OR REPLACE FUNCTION embedline.rerank(model text, query text, texts text [])
RETURNS double precision []
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.models import reranking
    return reranking.rerank(plpy, GD, model, query, texts)
$python$;

COMMENT ON FUNCTION embedline.rerank(text, text, text []) IS 'Return a reranker''s score of each text for a query. A higher score is a better answer; the scale is the model''s own.';
