-- Have a version serve. Locks: the routing view ACCESS EXCLUSIVE from its swap, the last step, to the end of the
-- transaction. So run it as a statement of its own.
CREATE OR REPLACE FUNCTION embedline.cutover(
    pipeline_name text,
    version_number integer,
    override_reason text DEFAULT NULL
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $python$
    from embedline.versions import cutover
    return cutover.cutover(plpy, GD, pipeline_name, version_number, override_reason)
$python$;

COMMENT ON FUNCTION embedline.cutover(text, integer, text) IS 'Have a complete, indexed version with a passing gate serve. Without a passing gate it needs a reason, which is recorded in embedline.cutover.';
