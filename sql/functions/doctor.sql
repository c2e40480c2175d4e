-- List all findings about the server, the database, and what Embedline has stored: alerts, settings, roles, vectors.
-- SECURITY DEFINER, because settings of roles, jobs and the generated tables are hidden from all but superusers.
CREATE OR REPLACE FUNCTION embedline.doctor()
RETURNS TABLE (severity text, finding text, subject text, message text, remedy text)
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.observe import doctor
    return doctor.doctor(plpy, GD)
$python$;

COMMENT ON FUNCTION embedline.doctor() IS 'List all findings, the gravest first: alerts, settings, worker roles, indexes, stored vectors, publications, packages.';
