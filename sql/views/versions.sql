-- One row per version of a pipeline: its progress, and until when a rollback to it is possible.
CREATE OR REPLACE VIEW embedline.versions AS
SELECT
    p.name AS pipeline,
    v.number AS version,
    m.name AS model,
    v.state,
    v.version_id = p.serving_version_id AS serving,
    c.chunks,
    c.vectors,
    c.chunks - c.vectors AS missing,
    q.queued,
    c.dead_letters,
    c.accepted,
    CASE
        WHEN v.index_method = 'none' THEN 'none'
        WHEN i.state <> 'missing' THEN i.state
        WHEN v.state = 'complete' THEN 'waiting'
        ELSE 'after backfill'
    END AS index_state,
    w.rollback_until,
    embedline._shown_error(v.last_error) AS last_error,
    e.verdict AS gate,
    ir.ef_search,
    ir.recall AS index_recall,
    ir.probes,
    t.base AS trained_from,
    t.pairs_hash,
    pb.in_batches
FROM embedline.pipeline AS p
INNER JOIN embedline.version AS v ON p.pipeline_id = v.pipeline_id
INNER JOIN embedline.model AS m ON v.model_id = m.model_id
LEFT JOIN embedline.index_reach AS ir ON v.version_id = ir.version_id
CROSS JOIN LATERAL embedline._index_state(p.name || '_v' || v.number || '_embedding_idx') AS i (state)
CROSS JOIN LATERAL embedline._version_counts(p.name, v.number, v.chunk_set, v.version_id) AS c
CROSS JOIN LATERAL (
    SELECT coalesce(sum(o.text_count), 0)::bigint AS in_batches FROM embedline.provider_batch AS o
    WHERE o.version_id = v.version_id AND o.state <> 'done'
) AS pb
CROSS JOIN LATERAL (
    SELECT coalesce(sum(cardinality(r.chunk_ids)), 0)::bigint AS queued
    FROM embedline.version_queue AS r
    WHERE r.version_id = v.version_id
) AS q
CROSS JOIN LATERAL (
    SELECT
        max(o.performed_at) + make_interval(secs => 3600 * coalesce((
            SELECT s.value::double precision FROM embedline.setting AS s
            WHERE s.name = 'rollback_window_hours'
        ), 48)) AS rollback_until
    FROM embedline.cutover AS o
    WHERE o.to_version_id = p.serving_version_id AND o.from_version_id = v.version_id AND o.kind = 'cutover'
) AS w
LEFT JOIN LATERAL embedline._gate(v.version_id) AS e ON true
LEFT JOIN embedline.training AS t ON v.model_id = t.model_id;

COMMENT ON VIEW embedline.versions IS 'One row per version of a pipeline: its counts, its index, its gate, and until when it is kept.';
COMMENT ON COLUMN embedline.versions.missing IS 'Chunks without a vector of this version: queued, dead letters, or of the backfill';
COMMENT ON COLUMN embedline.versions.queued IS 'Chunks that wait or are in flight; ranges of the backfill that are not claimed yet are not counted';
COMMENT ON COLUMN embedline.versions.in_batches IS 'Texts of the version in batches of the provider; see embedline.provider_batch';
COMMENT ON COLUMN embedline.versions.rollback_until IS 'Until then drop_embedding_version refuses, because the serving version took over from this one';
COMMENT ON COLUMN embedline.versions.ef_search IS 'hnsw.ef_search that searches use, as measured; NULL if it is not measured yet and 100 is used';
COMMENT ON COLUMN embedline.versions.probes IS 'ivfflat.probes that searches use, as measured; NULL if it is not measured yet and a tenth of the lists is used';
COMMENT ON COLUMN embedline.versions.index_recall IS 'Lowest recall@10 of the kinds of queries that it was measured with; see embedline.index_reach';
COMMENT ON COLUMN embedline.versions.gate IS 'Verdict of the last evaluation of this recipe against the serving version; cutover needs pass';
COMMENT ON COLUMN embedline.versions.trained_from IS 'Name of the model that embedline finetune has trained further; NULL for any other model';
COMMENT ON COLUMN embedline.versions.pairs_hash IS 'SHA-256 of the pairs that the model was trained on; embedline.training has the rest of its lineage';
