-- One row per task that is under way: backfills, changes that wait, version fills, index builds, evaluations.
CREATE OR REPLACE VIEW embedline.progress AS
SELECT
    w.pipeline,
    w.version,
    w.task,
    w.phase,
    w.done,
    w.total,
    w.unit,
    w.percent,
    w.rate,
    CASE WHEN w.rate > 0 THEN make_interval(secs => trunc((w.total - coalesce(w.done, 0)) / w.rate)) END AS eta,
    w.tokens,
    w.money
FROM embedline._progress() AS w
ORDER BY w.pipeline, w.version, w.task;

COMMENT ON VIEW embedline.progress IS 'One row per task under way: backfill, changes, keywords, fill (of a new version), derived vectors, index, evaluate, preview_version, compare_chunkings.';
COMMENT ON COLUMN embedline.progress.phase IS 'The step of the task, or what holds it back';
COMMENT ON COLUMN embedline.progress.total IS 'Of backfill and fill an estimate by the table''s statistics';
COMMENT ON COLUMN embedline.progress.rate IS 'Units a second over the last minute; NULL if nothing was done';
COMMENT ON COLUMN embedline.progress.tokens IS 'Tokens that the pipeline has sent to this model since the version was made, by usage days (UTC)';
COMMENT ON COLUMN embedline.progress.money IS 'Money for these tokens, at the price of the model at that time';
