-- List each index that a version has or should have, with its state and the progress of its build.
-- SECURITY DEFINER, because progress and locks of other roles' sessions are hidden from all but superusers.
CREATE OR REPLACE FUNCTION embedline.index_progress(pipeline_name text DEFAULT NULL)
RETURNS TABLE (
    pipeline text, version integer, name text, state text, phase text, percent double precision, bytes bigint
)
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $sql$
    WITH wanted AS (
        SELECT p.name AS pipeline, v.number, 'embedding' AS precision, 0 AS place
        FROM embedline.pipeline AS p INNER JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
        WHERE v.index_method <> 'none'
        UNION ALL
        SELECT p.name, v.number, x.name, 1
        FROM embedline.pipeline AS p INNER JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
        INNER JOIN embedline.precision_index AS x ON x.version_id = v.version_id
    )

    SELECT
        w.pipeline,
        w.number,
        w.pipeline || '_v' || w.number || '_' || w.precision || '_idx',
        s.state,
        CASE
            WHEN s.state <> 'valid' THEN b.phase || coalesce(b.waits_for, '')
            WHEN n.state IN ('building', 'invalid') THEN 'building again: ' || coalesce(b.phase || coalesce(b.waits_for, ''), n.state)
        END,
        CASE WHEN s.state <> 'valid' OR n.state = 'building' THEN b.percent END,
        CASE WHEN s.state = 'valid' THEN pg_relation_size(i.indexrelid) END
    FROM wanted AS w
    CROSS JOIN LATERAL embedline._index_state(w.pipeline || '_v' || w.number || '_' || w.precision || '_idx') AS s (state)
    LEFT JOIN pg_index AS i
        ON i.indexrelid = to_regclass(format('embedline_data.%I', w.pipeline || '_v' || w.number || '_' || w.precision || '_idx'))
    -- The index whose lists take the place of these once they are built (indexes/lists.py).
    LEFT JOIN pg_class AS x
        ON w.place = 0 AND x.relname = w.pipeline || '_v' || w.number || '_next_idx'
        AND x.relnamespace = 'embedline_data'::regnamespace
    CROSS JOIN LATERAL (
        SELECT CASE WHEN x.oid IS NOT NULL THEN embedline._index_state(x.relname) END AS state
    ) AS n
    LEFT JOIN LATERAL (
        SELECT g.phase, coalesce(
            -- When IVFFlat writes its lists, the blocks are those of the scan before.
            CASE WHEN g.phase NOT LIKE '%loading tuples%' THEN 100.0 * nullif(g.blocks_done, 0) / nullif(g.blocks_total, 0) END,
            100.0 * nullif(g.tuples_done, 0) / nullif(g.tuples_total, 0), 0
        ) AS percent,
        -- A prepared transaction has no session to show. A build waits until it is committed or rolled back.
        CASE WHEN g.phase LIKE 'waiting for%' AND coalesce(g.current_locker_pid, 0) = 0 THEN (
            SELECT ' (prepared transaction ' || quote_literal(x.gid) || ')' FROM pg_prepared_xacts AS x
            WHERE x.database = current_database() ORDER BY x.prepared LIMIT 1
        ) END AS waits_for
        FROM pg_stat_progress_create_index AS g
        WHERE g.index_relid IN (i.indexrelid, x.oid) OR (g.relid = i.indrelid AND g.index_relid = 0) LIMIT 1
    ) AS b ON true
    WHERE w.pipeline = pipeline_name OR pipeline_name IS NULL
    ORDER BY w.pipeline, w.number, w.place, w.precision
$sql$;

COMMENT ON FUNCTION embedline.index_progress(text) IS 'List each vector index with its state and the progress of its build.';
