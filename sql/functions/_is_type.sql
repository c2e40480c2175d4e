-- Return true if a type is the wanted one, or a domain over it.
CREATE OR REPLACE FUNCTION embedline._is_type(given regtype, wanted regtype)
RETURNS boolean
LANGUAGE sql
STABLE
SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH RECURSIVE base AS (
        SELECT given::oid AS type_oid
        UNION ALL
        SELECT t.typbasetype FROM base AS b INNER JOIN pg_type AS t ON b.type_oid = t.oid WHERE t.typbasetype <> 0
    )

    SELECT EXISTS (SELECT FROM base AS b WHERE b.type_oid = wanted::oid)
$sql$;

COMMENT ON FUNCTION embedline._is_type(regtype, regtype) IS 'Internal: return true if a type is the wanted one, or a domain over it.';
