-- The work of each hour (UTC), by pipeline and version: batches that are kept, and sums of older ones.
CREATE OR REPLACE VIEW embedline.throughput AS
SELECT
    h.hour,
    p.name AS pipeline,
    v.number AS version,
    sum(h.batch_count)::bigint AS batches,
    sum(h.row_count)::bigint AS rows,
    sum(h.embedded_count)::bigint AS embedded,
    sum(h.retried_count)::bigint AS retried,
    sum(h.dead_count)::bigint AS dead,
    sum(h.chunk_count)::bigint AS chunks,
    sum(h.request_count)::bigint AS requests,
    sum(h.token_count)::bigint AS tokens,
    sum(h.content_bytes)::bigint AS content_bytes,
    sum(h.claim_ms) / 1000 AS claim_seconds,
    sum(h.read_ms) / 1000 AS read_seconds,
    sum(h.chunk_ms) / 1000 AS chunk_seconds,
    sum(h.embed_ms) / 1000 AS embed_seconds,
    sum(h.write_ms) / 1000 AS write_seconds
FROM (
    SELECT
        t.pipeline_id,
        t.version_id,
        t.hour,
        t.batch_count,
        t.row_count,
        t.embedded_count,
        t.retried_count,
        t.dead_count,
        t.chunk_count,
        t.request_count,
        t.token_count,
        t.content_bytes,
        t.claim_ms,
        t.read_ms,
        t.chunk_ms,
        t.embed_ms,
        t.write_ms
    FROM embedline.batch_hour AS t
    UNION ALL
    SELECT
        b.pipeline_id,
        b.version_id,
        date_trunc('hour', b.finished_at, 'UTC') AS hour,
        1 AS batch_count,
        b.row_count,
        b.embedded_count,
        b.retried_count,
        b.dead_count,
        b.chunk_count,
        b.request_count,
        b.token_count,
        b.content_bytes,
        b.claim_ms,
        b.read_ms,
        b.chunk_ms,
        b.embed_ms,
        b.write_ms
    FROM embedline.finished_batch AS b
) AS h
INNER JOIN embedline.pipeline AS p ON h.pipeline_id = p.pipeline_id
INNER JOIN embedline.version AS v ON h.version_id = v.version_id
GROUP BY h.hour, p.name, v.number
ORDER BY h.hour DESC, p.name, v.number;

COMMENT ON VIEW embedline.throughput IS 'The work of each hour (UTC) by pipeline and version: batches, rows, tokens, and seconds of each stage.';
COMMENT ON COLUMN embedline.throughput.embed_seconds IS 'From the first request to the last answer of each batch; batches of several workers overlap';
