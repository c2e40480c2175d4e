-- Remove lent vectors that are over their time. There is one row for each version that borrows, so nothing is scanned.
CREATE OR REPLACE FUNCTION embedline._purge_loans()
RETURNS void
LANGUAGE sql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    DELETE FROM embedline.loan WHERE expires_at < clock_timestamp();
$sql$;

COMMENT ON FUNCTION embedline._purge_loans() IS 'Internal: remove lent vectors that are over their time.';
