-- The evaluation that decides on a cutover to a version, if there is one. cutover and the view versions ask it.
-- It is of the version's recipe as it is now, and later than the last alteration of the pipeline. It compares with the
-- serving version, known by its fingerprint, as numbers are given again. For the serving version any baseline counts.
-- SECURITY DEFINER: a reader sees the verdict in embedline.versions, but not the evaluations.
CREATE OR REPLACE FUNCTION embedline._gate(wanted_version_id bigint)
RETURNS TABLE (evaluation_id bigint, verdict text)
LANGUAGE sql
STABLE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT e.evaluation_id, e.verdict
    FROM embedline.version AS v
    INNER JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
    INNER JOIN embedline.version AS s ON s.version_id = p.serving_version_id
    INNER JOIN embedline.evaluation AS e ON e.version_id = v.version_id
    WHERE
        v.version_id = wanted_version_id AND e.kind = 'gate' AND e.fingerprint = v.fingerprint
        AND (
            (e.baseline_version_id = s.version_id AND e.baseline_fingerprint = s.fingerprint)
            OR v.version_id = s.version_id
        )
        AND (p.altered_at IS NULL OR e.evaluated_at > p.altered_at)
    ORDER BY e.evaluation_id DESC
    LIMIT 1
$sql$;

COMMENT ON FUNCTION embedline._gate(bigint) IS 'Internal: the evaluation that decides on a cutover to a version.';
