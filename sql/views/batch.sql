-- One row per finished batch, the newest first: its rows, and the milliseconds of each stage.
CREATE OR REPLACE VIEW embedline.batch AS
SELECT
    p.name AS pipeline,
    v.number AS version,
    b.kind,
    b.row_count AS rows,
    b.chunk_count AS chunks,
    b.token_count AS tokens,
    round(b.claim_ms::numeric, 1) AS claim,
    round(b.read_ms::numeric, 1) AS read,
    round(b.chunk_ms::numeric, 1) AS chunk,
    round(b.embed_ms::numeric, 1) AS embed,
    round(b.write_ms::numeric, 1) AS write,
    b.finished_at,
    b.embedded_count AS embedded,
    b.retried_count AS retried,
    b.dead_count AS dead,
    b.request_count AS requests,
    b.content_bytes,
    b.failures,
    make_interval(secs => b.lag_seconds) AS lag,
    b.worker_id,
    b.batch_id
FROM embedline.finished_batch AS b
INNER JOIN embedline.pipeline AS p ON b.pipeline_id = p.pipeline_id
INNER JOIN embedline.version AS v ON b.version_id = v.version_id
ORDER BY b.batch_id DESC;

COMMENT ON VIEW embedline.batch IS 'One row per finished batch, the newest first; setting batch_retention_hours tells how long they stay.';
COMMENT ON COLUMN embedline.batch.kind IS 'change: changed rows; backfill: rows from before the pipeline; fill: chunks of a new version';
COMMENT ON COLUMN embedline.batch.tokens IS 'As the provider counted them, or as estimated if it did not';
COMMENT ON COLUMN embedline.batch.claim IS 'Milliseconds of the claim';
COMMENT ON COLUMN embedline.batch.read IS 'Milliseconds of reading the rows';
COMMENT ON COLUMN embedline.batch.chunk IS 'Milliseconds of cutting the texts';
COMMENT ON COLUMN embedline.batch.embed IS 'Milliseconds from the first request to the last answer';
COMMENT ON COLUMN embedline.batch.write IS 'Milliseconds of writing, without the commit; embedline.worker has the last commit';
COMMENT ON COLUMN embedline.batch.embedded IS 'Rows that were embedded; of a fill, chunks';
COMMENT ON COLUMN embedline.batch.retried IS 'Rows that had been tried before';
COMMENT ON COLUMN embedline.batch.dead IS 'Rows that were given up';
COMMENT ON COLUMN embedline.batch.failures IS 'Requests that failed, by class';
COMMENT ON COLUMN embedline.batch.lag IS 'Time from the oldest change of the batch to its write; NULL if the queue does not tell';
COMMENT ON COLUMN embedline.batch.worker_id IS 'The resident worker; NULL: a call of embed_pending';
