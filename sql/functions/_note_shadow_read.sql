-- Store how two versions compared in one search call. Nothing of the query is stored. Only search calls it.
CREATE OR REPLACE FUNCTION embedline._note_shadow_read(
    shadow_version_id bigint,
    k integer,
    overlap double precision,
    serving_seconds double precision,
    shadow_seconds double precision
)
RETURNS void
LANGUAGE sql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO embedline.shadow_read (pipeline_id, version_id, k, overlap, serving_seconds, shadow_seconds)
    SELECT v.pipeline_id, v.version_id, $2, least(greatest($3, 0), 1), $4, $5
    FROM embedline.version AS v WHERE v.version_id = $1;
$sql$;

COMMENT ON FUNCTION embedline._note_shadow_read(
    bigint, integer, double precision, double precision, double precision
) IS 'Internal: add a row to embedline.shadow_read.';
