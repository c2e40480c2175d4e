-- List the troubles of indexes and of the tables under them.
-- SECURITY DEFINER, because a reader may not name the schema of the generated tables.
CREATE OR REPLACE FUNCTION embedline._index_alerts()
RETURNS TABLE (severity text, alert text, subject text, since timestamptz, message text, remedy text)
LANGUAGE plpgsql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $plpgsql$
#variable_conflict use_column
BEGIN
    -- A session keeps the plan of this query; LANGUAGE sql would make it for each call, which takes 5 to 30 ms.
    RETURN QUERY
    WITH indexes AS MATERIALIZED (SELECT i.* FROM embedline.index_progress() AS i)

    SELECT 'critical', 'index_invalid', i.name, NULL::timestamptz,
        'a build failed or was cancelled, so searches read all vectors',
        format('SELECT embedline.build_vector_index(%L, %s);', i.pipeline, i.version)
    FROM indexes AS i WHERE i.state = 'invalid'
    UNION ALL
    SELECT 'warning', 'index_missing', i.name, v.completed_at,
        'the version is complete and nothing builds its index, so searches read all vectors',
        format('embedline build-index %s --version %s', quote_ident(i.pipeline), i.version)
    FROM indexes AS i
    INNER JOIN embedline.pipeline AS p ON p.name = i.pipeline
    INNER JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id AND v.number = i.version
    WHERE i.state = 'missing' AND v.state = 'complete' AND v.completed_at < clock_timestamp() - interval '10 minutes'
    UNION ALL
    SELECT 'warning', 'recall_low', p.name, r.measured_at,
        format(
            'recall@10 is %s with %s, and %s is asked for', round(r.recall::numeric, 3),
            CASE v.index_method WHEN 'ivfflat' THEN 'probes ' || r.probes ELSE 'ef_search ' || r.ef_search END, coalesce(r.recall_target, 0.99)
        ),
        CASE v.index_method
            WHEN 'ivfflat' THEN format('REINDEX INDEX CONCURRENTLY embedline_data.%I;', p.name || '_v' || v.number || '_embedding_idx')
            ELSE format('ALTER INDEX embedline_data.%1$I SET (ef_construction = 400); REINDEX INDEX CONCURRENTLY embedline_data.%1$I;', p.name || '_v' || v.number || '_embedding_idx')
        END
    FROM embedline.index_reach AS r
    INNER JOIN embedline.version AS v ON v.version_id = r.version_id
    INNER JOIN embedline.pipeline AS p ON p.serving_version_id = v.version_id
    WHERE r.recall < coalesce(r.recall_target, 0.99) - 0.01
    UNION ALL
    -- The rule is that of indexes/lists.py: where pg_cron is, a worker has the lists built again before this is seen for long.
    SELECT 'warning', 'lists_drifted', i.name, NULL,
        CASE
            WHEN t.reltuples >= greatest(2 * r.built_rows, 10000)
                THEN format('the lists were built on %s vectors, and there are %s', r.built_rows, t.reltuples::bigint)
            ELSE format(
                'recall@10 with %s probes was %s when the lists were built, and is %s', r.built_probes,
                round(r.built_recall::numeric, 3), round(r.kept_recall::numeric, 3)
            )
        END,
        format(
            'ALTER INDEX embedline_data.%1$I SET (lists = %2$s); REINDEX INDEX CONCURRENTLY embedline_data.%1$I;', i.name,
            coalesce(
                v.index_options ->> 'lists',
                greatest(floor(CASE WHEN t.reltuples <= 1000000 THEN t.reltuples / 1000 ELSE sqrt(t.reltuples) END), 1)::text
            )
        )
    FROM indexes AS i
    INNER JOIN embedline.pipeline AS p ON p.name = i.pipeline
    INNER JOIN embedline.version AS v
        ON v.version_id = p.serving_version_id AND v.number = i.version AND v.index_method = 'ivfflat'
    INNER JOIN embedline.index_reach AS r ON r.version_id = v.version_id AND r.built_rows IS NOT NULL
    INNER JOIN pg_class AS t
        ON t.relname = p.name || '_v' || v.number AND t.relnamespace = 'embedline_data'::regnamespace
    WHERE i.name = p.name || '_v' || v.number || '_embedding_idx' AND i.state = 'valid' AND i.phase IS NULL
        AND (t.reltuples >= greatest(2 * r.built_rows, 10000) OR r.kept_recall < r.built_recall - 0.05)
    UNION ALL
    SELECT 'warning', 'indexes_exceed_memory', 'server', NULL,
        format('the vector indexes have %s, over 80 %% of the memory of %s', pg_size_pretty(sum(i.bytes)), pg_size_pretty(f.memory_bytes)),
        (array_agg(format(
            'SELECT embedline.add_precision_index(%L, %s, %L);', i.pipeline, i.version,
            CASE WHEN v.index_method = 'ivfflat' OR v.column_type = 'halfvec' THEN 'binary' ELSE 'halfvec' END
        ) ORDER BY i.bytes DESC NULLS LAST))[1]
    FROM indexes AS i
    INNER JOIN embedline.pipeline AS p ON p.name = i.pipeline
    INNER JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id AND v.number = i.version
    CROSS JOIN embedline._server_facts() AS f
    GROUP BY f.memory_bytes HAVING sum(i.bytes) > 0.8 * f.memory_bytes
    UNION ALL
    SELECT 'warning', 'dead_tuples', t.relname, t.last_autovacuum,
        format('%s of %s rows are dead: vacuum does not keep up, or an old snapshot keeps them', t.n_dead_tup, t.n_live_tup + t.n_dead_tup),
        format('VACUUM embedline_data.%I;', t.relname)
    FROM pg_stat_all_tables AS t
    WHERE t.schemaname = 'embedline_data' AND t.n_dead_tup > 100000 AND t.n_dead_tup > 0.5 * t.n_live_tup
    ;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._index_alerts() IS 'Internal: list the troubles of indexes.';
