-- Change a pipeline's recipe while it is in use. NULL keeps a value, drop => '{filter}' removes an optional
-- expression.
-- Locks: with an expression, SHARE ROW EXCLUSIVE on the source until the commit; waits at most 5 s for it.
CREATE OR REPLACE FUNCTION embedline.alter_pipeline(
    name text,
    content text DEFAULT NULL,
    filter text DEFAULT NULL,
    document_prefix text DEFAULT NULL,
    tenant text DEFAULT NULL,
    chunking text DEFAULT NULL,
    chunk_tokens integer DEFAULT NULL,
    chunk_overlap integer DEFAULT NULL,
    chunking_options jsonb DEFAULT NULL,
    weight double precision DEFAULT NULL,
    keyword text DEFAULT NULL,
    drop text [] DEFAULT '{}', -- noqa: RF04
    caption text DEFAULT NULL,
    changed_by text DEFAULT NULL,
    -- Evaluated as the caller, so names in the expressions resolve as in the session.
    expression_search_path text DEFAULT current_setting('search_path')
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Generated code must not depend on the session.
SET quote_all_identifiers = off
SET standard_conforming_strings = on
AS $python$
    from embedline.pipelines import alter
    alter.alter_pipeline(plpy, GD, name, {
        "content": content, "filter": filter, "document_prefix": document_prefix, "tenant": tenant,
        "chunking": chunking, "chunk_tokens": chunk_tokens, "chunk_overlap": chunk_overlap,
        "chunking_options": chunking_options, "weight": weight, "keyword": keyword, "caption": caption, "changed_by": changed_by,
        "drop": drop, "expression_search_path": expression_search_path,
    })
$python$;

COMMENT ON FUNCTION embedline.alter_pipeline(text, text, text, text, text, text, integer, integer, jsonb, double precision, text, text [], text, text, text) IS 'Change a pipeline''s recipe. The affected rows are embedded again one by one, while search goes on.';
