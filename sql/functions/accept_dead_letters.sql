-- Let a version be indexed and serve without the chunks that it could not embed.
CREATE OR REPLACE FUNCTION embedline.accept_dead_letters(pipeline_name text, version_number integer)
RETURNS bigint
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.versions import fill
    return fill.accept_dead_letters(plpy, GD, pipeline_name, version_number)
$python$;

COMMENT ON FUNCTION embedline.accept_dead_letters(text, integer) IS 'Accept that a version lacks the chunks in embedline.version_dead_letter, and return how many. A version without any vector is never accepted.';
