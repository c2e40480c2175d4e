-- Count what waits of derived vectors, for embedline.derived_status and embedline.progress. All subjects are waiting
-- while they are about to be queued. Up to 10,000 rows of the queue are counted, of 100 subjects each at most.
-- SECURITY DEFINER, because a reader may not name the schema of the generated tables.
CREATE OR REPLACE FUNCTION embedline._derived_counts(derived_name text)
RETURNS TABLE (subjects bigint, waiting bigint, oldest_enqueued_at timestamptz)
LANGUAGE plpgsql
STABLE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    is_all boolean;
BEGIN
    EXECUTE format('SELECT count(*) FROM embedline_data.%I', derived_name || '_derived_subject') INTO subjects;
    EXECUTE format(
        'SELECT coalesce(sum(cardinality(r.subjects)), 0), bool_or(r.subjects IS NULL), min(r.enqueued_at) FROM ('
        'SELECT q.subjects, q.enqueued_at FROM embedline_data.%I AS q LIMIT 10000) AS r', derived_name || '_derived_dirty'
    ) INTO waiting, is_all, oldest_enqueued_at;
    IF is_all THEN
        waiting := greatest(waiting, subjects, 1);
    END IF;
    RETURN NEXT;
EXCEPTION
    WHEN undefined_table THEN
        -- Another session is dropping them.
        RETURN;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._derived_counts(text) IS 'Internal: count what waits of derived vectors.';
