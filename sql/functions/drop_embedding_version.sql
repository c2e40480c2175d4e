-- Contract: take a version away that does not serve. Locks, to the end of the transaction: its table, view and the
-- chunks ACCESS EXCLUSIVE; the source SHARE ROW EXCLUSIVE where a chunk table goes with it.
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
    from embedline.versions import versions
    return versions.drop_embedding_version(plpy, GD, pipeline_name, version_number, rollback_window)
$python$;

COMMENT ON FUNCTION embedline.drop_embedding_version(text, integer, interval) IS 'Drop a version that does not serve, with its vectors and what only it used; the one that served before is kept for the rollback window (48 hours unless set).';
