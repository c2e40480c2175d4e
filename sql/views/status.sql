-- One row per pipeline: the first view for a person on call.
CREATE OR REPLACE VIEW embedline.status AS
WITH reported AS (
    SELECT
        max(r.batch_rows) AS batch_rows,
        max(r.held_back_by) AS held_back_by
    FROM embedline.worker AS r
    WHERE r.reported_at > clock_timestamp() - interval '1 minute'
),

-- Of all pipelines at once, because 1,000 pipelines one by one would read all ranges 1,000 times.
range_blocks AS (
    SELECT
        r.pipeline_id,
        r.done,
        (r.end_tid::text::point)[0] - (r.next_tid::text::point)[0] AS blocks
    FROM embedline.backfill_range AS r
),

ranges AS (
    SELECT
        t.pipeline_id,
        sum(t.blocks)::bigint AS total,
        -- A claim may begin and end within one block, so an open range counts as one block at least.
        coalesce(sum(greatest(t.blocks, 1)) FILTER (WHERE NOT t.done), 0)::bigint AS open
    FROM range_blocks AS t
    GROUP BY t.pipeline_id
)

SELECT
    p.name AS pipeline,
    CASE WHEN t.state = 'source gone' THEN p.source_name ELSE p.source::text END AS source,
    m.name AS model,
    coalesce(t.state, p.state) AS state,
    c.pending,
    coalesce(greatest(b.total - b.open, 0), 0) AS backfill_done,
    coalesce(b.total, 0) AS backfill_total,
    v.state = 'complete' AS backfill_complete,
    clock_timestamp() - c.oldest_enqueued_at AS oldest_pending_age,
    d.dead_letters,
    coalesce(
        t.message || ': ' || t.remedy, embedline._shown_error(coalesce(x.last_error, c.last_row_error, h.last_error))
    ) AS last_error,
    h.last_error_at,
    w.workers_alive,
    CASE
        WHEN v.index_method = 'none' THEN 'none'
        WHEN i.state <> 'missing' THEN i.state
        WHEN v.state = 'complete' THEN 'waiting'
        ELSE 'after backfill'
    END AS index_state,
    k.batch_rows,
    k.held_back_by,
    n.verified_at,
    n.unrepaired,
    -- Rounded down, so that it is 100 only once the last row is counted.
    CASE
        WHEN v.state = 'complete' THEN 100
        WHEN b.total > 0 THEN least(trunc(100.0 * greatest(b.total - b.open, 0) / b.total, 1), 99.9)
        ELSE 0
    END AS backfill_percent,
    ir.ef_search,
    ir.recall AS index_recall,
    t.remedy,
    least(m.max_batch_items, m.batch_items) AS request_items,
    ir.probes,
    pb.in_batches
FROM embedline.pipeline AS p
INNER JOIN embedline.version AS v ON p.serving_version_id = v.version_id
INNER JOIN embedline.model AS m ON v.model_id = m.model_id
LEFT JOIN embedline.index_reach AS ir ON v.version_id = ir.version_id
LEFT JOIN embedline.pipeline_health AS h ON p.pipeline_id = h.pipeline_id
LEFT JOIN embedline.circuit AS x ON m.model_id = x.model_id
CROSS JOIN LATERAL embedline._index_state(p.name || '_v' || v.number || '_embedding_idx') AS i (state)
CROSS JOIN LATERAL embedline._source_trouble(p.pipeline_id) AS t
CROSS JOIN LATERAL embedline._pipeline_counts(p.name) AS c
LEFT JOIN ranges AS b ON p.pipeline_id = b.pipeline_id
CROSS JOIN LATERAL (
    SELECT count(*) AS dead_letters FROM embedline.dead_letter AS l
    WHERE l.pipeline_id = p.pipeline_id
) AS d
CROSS JOIN LATERAL embedline._workers_alive() AS w (workers_alive)
CROSS JOIN LATERAL (
    SELECT coalesce(sum(o.row_count), 0)::bigint AS in_batches FROM embedline.provider_batch AS o
    WHERE o.version_id = v.version_id AND o.state <> 'done'
) AS pb
CROSS JOIN reported AS k
CROSS JOIN LATERAL (
    SELECT
        max(o.verified_at) AS verified_at,
        (array_agg(o.finding_count - o.repaired_count ORDER BY o.verified_at DESC))[1] AS unrepaired
    FROM embedline.verification AS o
    WHERE o.pipeline_id = p.pipeline_id
) AS n;

COMMENT ON VIEW embedline.status IS 'One row per pipeline: waiting changes, progress of the backfill, the last error, the workers.';
COMMENT ON COLUMN embedline.status.state IS
'active or paused, or the trouble of the source: source gone, source replaced, key changed, key lost; see remedy';
COMMENT ON COLUMN embedline.status.remedy IS 'Statement to run if the source has a trouble';
COMMENT ON COLUMN embedline.status.pending IS 'Changes that wait or are in flight';
COMMENT ON COLUMN embedline.status.in_batches IS 'Those of them that wait for batches of the provider; see embedline.provider_batch';
COMMENT ON COLUMN embedline.status.backfill_done IS 'Blocks of the source that the backfill has read';
COMMENT ON COLUMN embedline.status.backfill_total IS 'Blocks of the source when the pipeline was created';
COMMENT ON COLUMN embedline.status.backfill_percent IS 'Share of the source that the backfill has read, in percent; 100 once every row was counted';
COMMENT ON COLUMN embedline.status.workers_alive IS 'Resident workers of this database, for all pipelines';
COMMENT ON COLUMN embedline.status.batch_rows IS 'Rows that a worker claims at a time now; embedline.worker shows more of each worker';
COMMENT ON COLUMN embedline.status.held_back_by IS 'Reason why workers slow down: a replica that lags, an old snapshot; NULL if none. See embedline.configure';
COMMENT ON COLUMN embedline.status.verified_at IS 'Time of the last embedline.verify';
COMMENT ON COLUMN embedline.status.unrepaired IS 'Findings of the last embedline.verify that it did not repair';
COMMENT ON COLUMN embedline.status.ef_search IS 'hnsw.ef_search that searches use, as measured; NULL if it is not measured yet and 100 is used';
COMMENT ON COLUMN embedline.status.probes IS 'ivfflat.probes that searches use, as measured; NULL if it is not measured yet and a tenth of the lists is used';
COMMENT ON COLUMN embedline.status.index_recall IS 'Lowest recall@10 of the kinds of queries that the index was measured with';
COMMENT ON COLUMN embedline.status.request_items IS 'Most texts of a request: max_batch_items of the model, or the number that passed if the provider refused more';
COMMENT ON COLUMN embedline.status.index_state IS
'none, after backfill, waiting (SELECT embedline.index_statement(pipeline) builds it by hand), building, invalid, valid';
