-- Reserve a reranking in the ledger before its call. SECURITY DEFINER, because those who search may not write the
-- ledger. A reader can exhaust a budget with it, as with real calls, but can take no amount back that was settled.
CREATE OR REPLACE FUNCTION embedline._reserve_rerank(
    model_name text, pipeline_id bigint, amount bigint,
    OUT reservation_id bigint, OUT wait_seconds double precision, OUT reason text
)
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.spending import rerank_calls
    return rerank_calls.reserve_rerank(plpy, GD, model_name, pipeline_id, amount)
$python$;

COMMENT ON FUNCTION embedline._reserve_rerank(text, bigint, bigint) IS 'Internal: reserve a reranking, or tell why it may not be asked for now.';
