-- Call embedline.embed_pending without a schema and without a search_path: SELECT embed_pending(1000) in a fresh
-- session.
CREATE OR REPLACE FUNCTION public.embed_pending(max_rows integer DEFAULT 1000, pipeline_name text DEFAULT NULL)
RETURNS integer
LANGUAGE sql
VOLATILE
SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT embedline.embed_pending(max_rows, pipeline_name);
$sql$;

COMMENT ON FUNCTION public.embed_pending(integer, text) IS 'Embed up to max_rows changed rows; short for embedline.embed_pending.';
