-- Return how a client should build an index: statement, settings, notices. Refuses while the version is not verified.
CREATE OR REPLACE FUNCTION embedline._index_plan(
    pipeline_name text, version_number integer, precision_name text, parallel_workers integer
)
RETURNS jsonb
LANGUAGE plpython3u
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.indexes import build
    return build.index_plan(plpy, GD, pipeline_name, version_number, precision_name, parallel_workers)
$python$;

COMMENT ON FUNCTION embedline._index_plan(text, integer, text, integer) IS 'Internal: return how embedline build-index and Alembic build an index.';
