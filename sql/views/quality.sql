-- The series of measurements of quality, the newest first.
CREATE OR REPLACE VIEW embedline.quality AS
SELECT
    p.name AS pipeline,
    q.kind,
    date_trunc('second', q.measured_at) AS measured_at,
    round(q.value::numeric, 4) AS value,
    round(q.low::numeric, 4) AS low,
    round(q.high::numeric, 4) AS high,
    round(q.baseline::numeric, 4) AS baseline,
    CASE WHEN q.error IS NOT NULL THEN 'not measured' WHEN q.is_poor THEN 'poor' ELSE 'good' END AS verdict,
    q.query_count AS queries,
    v.number AS version,
    embedline._shown_error(q.error) AS error
FROM embedline.quality_check AS q
INNER JOIN embedline.pipeline AS p ON q.pipeline_id = p.pipeline_id
INNER JOIN embedline.version AS v ON q.version_id = v.version_id
ORDER BY q.measured_at DESC, q.check_id DESC;

COMMENT ON VIEW embedline.quality IS 'The series of measurements by check_quality, the newest first. It shows no text and no key.';
COMMENT ON COLUMN embedline.quality.kind IS 'canary: recall@10 of the canaries; reach, fidelity: recall@10 of the index for made-up and for real queries; drift: lowest cosine; lag: seconds';
COMMENT ON COLUMN embedline.quality.low IS 'Interval of 95 %; of canaries that of the difference to the baseline, query by query';
COMMENT ON COLUMN embedline.quality.baseline IS 'The first measurement, or the one that accept_quality took';
COMMENT ON COLUMN embedline.quality.verdict IS 'good; poor: raises an alert; not measured: error says why';
