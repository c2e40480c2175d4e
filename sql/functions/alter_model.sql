-- Change a model's endpoint, key, limits and options. NULL keeps a value, '' removes base_url or api_key_env.
-- Superusers only.
CREATE OR REPLACE FUNCTION embedline.alter_model(
    name text,
    base_url text DEFAULT NULL,
    api_key_env text DEFAULT NULL,
    concurrency integer DEFAULT NULL,
    max_batch_items integer DEFAULT NULL,
    max_batch_tokens integer DEFAULT NULL,
    timeout_seconds double precision DEFAULT NULL,
    options jsonb DEFAULT NULL,
    price_per_million_tokens numeric DEFAULT NULL,
    model text DEFAULT NULL
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.verify import alter_model
    alter_model.alter_model(plpy, GD, name, {
        "base_url": base_url, "api_key_env": api_key_env, "concurrency": concurrency,
        "max_batch_items": max_batch_items, "max_batch_tokens": max_batch_tokens, "timeout_seconds": timeout_seconds,
        "options": options, "price_per_million_tokens": price_per_million_tokens, "model": model,
    })
$python$;

COMMENT ON FUNCTION embedline.alter_model(text, text, text, integer, integer, integer, double precision, jsonb, numeric, text) IS 'Change a model''s endpoint, key, limits and options. An endpoint is accepted only if it gives the stored vectors again.';
