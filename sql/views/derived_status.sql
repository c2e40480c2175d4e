-- Derived vectors, what waits of them, and what failed last.
CREATE OR REPLACE VIEW embedline.derived_status AS
SELECT
    d.name,
    p.name AS pipeline,
    d.events,
    d.derived_view AS view,
    d.half_life,
    c.subjects,
    c.waiting,
    c.oldest_enqueued_at,
    embedline._shown_error(d.last_error) AS last_error,
    d.last_error_at
FROM embedline.derived AS d
INNER JOIN embedline.pipeline AS p ON p.pipeline_id = d.pipeline_id
CROSS JOIN LATERAL embedline._derived_counts(d.name) AS c
ORDER BY d.name;

COMMENT ON VIEW embedline.derived_status IS 'One row for derived vectors of a table of events: subjects, how many wait to be computed, the last error.';
COMMENT ON COLUMN embedline.derived_status.subjects IS 'Subjects that have events';
COMMENT ON COLUMN embedline.derived_status.waiting IS 'Subjects that are queued; one that is queued twice counts twice';
