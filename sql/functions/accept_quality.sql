-- Take the last measurements as the baseline of later ones.
CREATE OR REPLACE FUNCTION embedline.accept_quality(pipeline_name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.observe import check_quality
    check_quality.accept_quality(plpy, GD, pipeline_name)
$python$;

COMMENT ON FUNCTION embedline.accept_quality(text) IS 'Take the last measurements as the baseline, and the model as it is now as the reference; alerts of quality end.';
