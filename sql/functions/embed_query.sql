-- Return the vector of a query text, from the model that serves the pipeline. As a scalar subquery it is computed
-- once:
-- ORDER BY embedding <=> (SELECT embedline.embed_query('docs', 'text')).
CREATE OR REPLACE FUNCTION embedline.embed_query(pipeline_name text, query text)
RETURNS vector
LANGUAGE plpython3u
STABLE
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.search import search
    return search.embed_query(plpy, GD, pipeline_name, query)
$python$;

COMMENT ON FUNCTION embedline.embed_query(text, text) IS 'Return the vector of a query text, from the model whose vectors the pipeline serves.';
