-- Return whether searches find a row of the source as it is now, since when, and if not, why. Runs with the caller's
-- rights: a row that row-level security hides is absent.
CREATE OR REPLACE FUNCTION embedline.state(pipeline_name text, key text, version integer DEFAULT NULL)
RETURNS TABLE (state text, since timestamptz, reason text)
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
SET jit = off
-- Keys travel as text, in the form in which search returns them.
SET extra_float_digits = 1
AS $python$
    from embedline.search import state
    return state.state(plpy, GD, pipeline_name, key, version)
$python$;

COMMENT ON FUNCTION embedline.state(text, text, integer) IS 'Return the state of one row: fresh, partial, pending, failed, excluded or absent; since when; and the reason.';
