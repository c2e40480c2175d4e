-- Keep a table's embeddings true to its rows: capture, tables, routing view, backfill ranges. Embeds nothing itself.
-- Locks: SHARE ROW EXCLUSIVE on the source while its triggers are created; waits at most 5 s for it.
CREATE OR REPLACE FUNCTION embedline.create_pipeline(
    name text,
    source regclass,
    content text,
    model text,
    filter text DEFAULT NULL,
    -- NULL: recursive for texts, none for images and recordings.
    chunking text DEFAULT NULL,
    chunk_tokens integer DEFAULT NULL,
    chunk_overlap integer DEFAULT 0,
    column_type text DEFAULT 'vector',
    distance text DEFAULT 'cosine',
    index_method text DEFAULT 'hnsw',
    index_options jsonb DEFAULT '{}',
    capture text DEFAULT 'auto',
    document_prefix text DEFAULT NULL,
    tenant text DEFAULT NULL,
    weight double precision DEFAULT 1,
    chunking_options jsonb DEFAULT '{}',
    keyword text DEFAULT NULL,
    modality text DEFAULT 'text',
    caption text DEFAULT NULL,
    changed_by text DEFAULT NULL,
    -- Evaluated as the caller, so names in the expressions resolve as in the session.
    expression_search_path text DEFAULT current_setting('search_path')
)
RETURNS text
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Generated code must not depend on the session.
SET quote_all_identifiers = off
SET standard_conforming_strings = on
AS $python$
    from embedline.pipelines import create
    return create.create_pipeline(plpy, GD, {
        "name": name, "source": source, "content": content, "model": model, "filter": filter,
        "chunking": chunking, "chunk_tokens": chunk_tokens, "chunk_overlap": chunk_overlap,
        "column_type": column_type, "distance": distance, "index_method": index_method,
        "index_options": index_options, "capture": capture, "document_prefix": document_prefix, "tenant": tenant,
        "weight": weight, "chunking_options": chunking_options, "keyword": keyword,
        "modality": modality, "caption": caption, "changed_by": changed_by,
        "expression_search_path": expression_search_path,
    })
$python$;

COMMENT ON FUNCTION embedline.create_pipeline(text, regclass, text, text, text, text, integer, integer, text, text, text, jsonb, text, text, text, double precision, jsonb, text, text, text, text, text) IS 'Watch a table; content is an SQL expression over its columns. Returns the routing view, <name>_embedding in the table''s schema.';
