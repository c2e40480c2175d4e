-- Return the hash by which two queries count as the same: case, punctuation and spaces do not matter. Locks: none.
CREATE OR REPLACE FUNCTION embedline.query_hash(query text)
RETURNS text
LANGUAGE plpython3u
IMMUTABLE
STRICT
PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.core import query_hash
    return query_hash.query_hash(query)
$python$;

COMMENT ON FUNCTION embedline.query_hash(text) IS 'Return a hash that is the same for queries that differ only in case, punctuation and spaces; training_pair holds it.';
