-- Remove derived vectors with their triggers and view; the table of events stays as it is.
CREATE OR REPLACE FUNCTION embedline.drop_derived(name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.pipelines import derived
    derived.drop_derived(plpy, GD, name)
$python$;

COMMENT ON FUNCTION embedline.drop_derived(text) IS 'Remove derived vectors with their triggers and view; the table of events stays.';
