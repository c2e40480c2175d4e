-- Let a version have a shadow index of less precision: halfvec, binary, or a prefix. It is built as its own one is.
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

COMMENT ON FUNCTION embedline.add_precision_index(text, integer, text, integer, real) IS 'Let a version have a shadow index of less precision, and return its name.';
