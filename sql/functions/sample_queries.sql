-- Have searches note their texts with this probability, or no longer. Lock: the pipeline's row for an instant.
CREATE OR REPLACE FUNCTION embedline.sample_queries(
    pipeline_name text,
    share double precision,
    retention interval DEFAULT '7 days'
)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.observe import sample_queries
    sample_queries.sample_queries(plpy, GD, pipeline_name, share, retention)
$python$;

COMMENT ON FUNCTION embedline.sample_queries(text, double precision, interval) IS 'Have this share of searches note their text in embedline.query_sample for so long; 0 ends that and removes what was noted.';
