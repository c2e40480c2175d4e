-- Declare a shadow index of less precision for a version: halfvec, binary, or a prefix. It is built as the version's
-- own index is.
CREATE OR REPLACE FUNCTION embedline.add_precision_index(
    pipeline_name text,
    version_number integer,
    kind text,
    dimensions integer DEFAULT NULL,
    oversampling real DEFAULT 4
)
RETURNS text
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.indexes import precision
    return precision.add_precision_index(plpy, GD, pipeline_name, version_number, kind, dimensions, oversampling)
$python$;

COMMENT ON FUNCTION embedline.add_precision_index(text, integer, text, integer, real) IS 'Declare a shadow index of less precision for a version, and return its name.';
