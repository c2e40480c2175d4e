-- Expand: add a version of another model, dimension, type, distance or chunking, written with every change from now
-- on. NULL takes a parameter from the serving version.
-- Locks: the chunk table SHARE ROW EXCLUSIVE to the end of the transaction, if the version has no chunks of its own. A
-- DELETE on the source waits for that lock.
CREATE OR REPLACE FUNCTION embedline.add_embedding_version(
    pipeline_name text,
    model text,
    column_type text DEFAULT NULL,
    distance text DEFAULT NULL,
    index_method text DEFAULT NULL,
    index_options jsonb DEFAULT NULL,
    chunking text DEFAULT NULL,
    chunk_tokens integer DEFAULT NULL,
    chunk_overlap integer DEFAULT NULL,
    chunking_options jsonb DEFAULT NULL,
    backfill_order text DEFAULT 'oldest_first',
    backfill_rate integer DEFAULT NULL
)
RETURNS integer
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.versions import add
    return add.add_embedding_version(plpy, GD, pipeline_name, {
        "model": model, "column_type": column_type, "distance": distance, "index_method": index_method,
        "index_options": index_options, "chunking": chunking, "chunk_tokens": chunk_tokens, "chunk_overlap": chunk_overlap,
        "chunking_options": chunking_options, "backfill_order": backfill_order, "backfill_rate": backfill_rate,
    })
$python$;

COMMENT ON FUNCTION embedline.add_embedding_version(
    text, text, text, text, text, jsonb, text, integer, integer, jsonb, text, integer
) IS 'Add a version to a pipeline, begin to write and fill it, and return its number. It serves no search before its cutover.';
