-- Correct the reservation of a reranking to the provider's count. SECURITY DEFINER, because those who search may not
-- write the ledger. A settled reservation stays as it is.
CREATE OR REPLACE FUNCTION embedline._settle_rerank(reservation_id bigint, amount bigint)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.spending import rerank_calls
    rerank_calls.settle_rerank(plpy, GD, reservation_id, amount)
$python$;

COMMENT ON FUNCTION embedline._settle_rerank(bigint, bigint) IS 'Internal: settle the reservation of a reranking.';
