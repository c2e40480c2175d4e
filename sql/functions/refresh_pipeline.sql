-- Follow the source: show new columns in the routing view, and capture columns that a new BEFORE UPDATE trigger
-- changes.
CREATE OR REPLACE FUNCTION embedline.refresh_pipeline(name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.pipelines import follow
    follow.refresh_pipeline(plpy, GD, name)
$python$;

COMMENT ON FUNCTION embedline.refresh_pipeline(text) IS 'Show new source columns in the routing view, and capture columns that a new BEFORE UPDATE trigger changes.';
