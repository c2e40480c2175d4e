-- Contract: drop a version that does not serve.
-- Locks, to the end of the transaction: its table, view and the chunks ACCESS EXCLUSIVE. If a chunk table is dropped
-- with it, also the source SHARE ROW EXCLUSIVE.
CREATE OR REPLACE FUNCTION embedline.drop_embedding_version(
    pipeline_name text,
    version_number integer,
    rollback_window interval DEFAULT NULL
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.versions import drop
    return drop.drop_embedding_version(plpy, GD, pipeline_name, version_number, rollback_window)
$python$;

COMMENT ON FUNCTION embedline.drop_embedding_version(text, integer, interval) IS 'Drop a version that does not serve, with its vectors and unshared objects. The version that served before is kept for the rollback window (48 hours unless set).';
