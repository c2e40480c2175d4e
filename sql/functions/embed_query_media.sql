-- Return the vector of an image or a recording, from the model that serves the pipeline. As a scalar subquery it is
-- computed once:
-- ORDER BY embedding <=> (SELECT embedline.embed_query('photos', pg_read_binary_file('shoe.jpg'))).
CREATE OR REPLACE FUNCTION embedline.embed_query(pipeline_name text, query bytea)
RETURNS vector
LANGUAGE plpython3u
STABLE
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.search import search
    return search.embed_query_media(plpy, GD, pipeline_name, query)
$python$;

COMMENT ON FUNCTION embedline.embed_query(text, bytea) IS 'Return the vector of an image or a recording, from the model whose vectors the pipeline serves.';
