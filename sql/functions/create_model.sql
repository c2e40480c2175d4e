-- Register a model that embeds, or a reranker: probe it once and store its dimensions and limits. Superusers only.
CREATE OR REPLACE FUNCTION embedline.create_model(
    name text,
    provider text,
    model text,
    dimensions integer DEFAULT NULL,
    base_url text DEFAULT NULL,
    api_key_env text DEFAULT NULL,
    revision text DEFAULT NULL,
    document_prefix text DEFAULT '',
    query_prefix text DEFAULT '',
    max_batch_items integer DEFAULT 2048,
    max_batch_tokens integer DEFAULT 300000,
    concurrency integer DEFAULT 8,
    timeout_seconds double precision DEFAULT 60,
    options jsonb DEFAULT '{}',
    price_per_million_tokens numeric DEFAULT NULL,
    task text DEFAULT 'embed'
)
RETURNS text
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.models import register
    return register.create_model(plpy, GD, {
        "name": name, "provider": provider, "model": model, "dimensions": dimensions, "base_url": base_url,
        "api_key_env": api_key_env, "revision": revision, "document_prefix": document_prefix,
        "query_prefix": query_prefix, "max_batch_items": max_batch_items, "max_batch_tokens": max_batch_tokens,
        "concurrency": concurrency, "timeout_seconds": timeout_seconds, "options": options,
        "price_per_million_tokens": price_per_million_tokens, "task": task,
    })
$python$;

COMMENT ON FUNCTION embedline.create_model(text, text, text, integer, text, text, text, text, text, integer, integer, integer, double precision, jsonb, numeric, text) IS 'Register a model that embeds or, with task rerank, a reranker. Probes it once and returns its name.';
