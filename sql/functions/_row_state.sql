-- Return the state of one row of a source, whether or not the caller may read it. No reader can name its schema. The
-- generated functions <pipeline>_v<n>_state call it for a row that their caller may read.
CREATE OR REPLACE FUNCTION embedline_data._row_state(
    pipeline_name text,
    version_number integer,
    key_texts text []
)
RETURNS TABLE (state text, since timestamptz, reason text)
LANGUAGE plpython3u
VOLATILE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $python$
    from embedline.search import row_state
    return row_state.row_state(plpy, GD, pipeline_name, version_number, key_texts)
$python$;

COMMENT ON FUNCTION embedline_data._row_state(text, integer, text []) IS 'Internal: decide the state of one row, for embedline.state.';
