-- Have search without a mode use this one, for the version that serves or another one.
CREATE OR REPLACE FUNCTION embedline.use_mode(
    pipeline_name text,
    mode text,
    version_number integer DEFAULT NULL,
    override_reason text DEFAULT NULL
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.versions import use_mode
    use_mode.use_mode(plpy, GD, pipeline_name, mode, version_number, override_reason)
$python$;

COMMENT ON FUNCTION embedline.use_mode(text, text, integer, text) IS 'Have search without a mode use this one. Other than vector it needs a pass of evaluate(…, mode => …), or a reason to override it. vector undoes it at once.';
