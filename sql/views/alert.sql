-- What is wrong now: one row per trouble, the gravest first, with the statement that helps.
CREATE OR REPLACE VIEW embedline.alert AS
SELECT
    c.severity,
    c.alert,
    c.subject,
    coalesce(c.since, s.since, clock_timestamp()) AS since,
    c.message,
    c.remedy
FROM embedline._alert_conditions() AS c
LEFT JOIN embedline.alert_state AS s ON c.alert = s.alert AND c.subject = s.subject
ORDER BY array_position(ARRAY['critical', 'warning', 'note'], c.severity), c.alert, c.subject;

COMMENT ON VIEW embedline.alert IS 'What is wrong now: one row per trouble, the gravest first, with the statement that helps. No row: nothing is wrong.';
COMMENT ON COLUMN embedline.alert.severity IS 'critical: rows are not embedded or not found; warning: they soon may not be; note: worth knowing';
COMMENT ON COLUMN embedline.alert.alert IS 'Name of the trouble; docs/on-call.md has each';
COMMENT ON COLUMN embedline.alert.subject IS 'The pipeline, model, index or table; server for the whole';
COMMENT ON COLUMN embedline.alert.since IS 'When it began, or when a worker or a scrape first saw it';
COMMENT ON COLUMN embedline.alert.remedy IS 'Statement or command to run';
