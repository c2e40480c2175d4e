-- Return the statements that prepare a subscriber of a pipeline, which needs pgvector and nothing else.
-- SECURITY DEFINER, because a source's owner may not name the generated tables.
CREATE OR REPLACE FUNCTION embedline.subscriber_ddl(
    pipeline_name text, with_source boolean DEFAULT NULL, reader text DEFAULT NULL
)
RETURNS text
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.replication import subscriber_ddl
    return subscriber_ddl.subscriber_ddl(plpy, GD, pipeline_name, with_source, reader)
$python$;

COMMENT ON FUNCTION embedline.subscriber_ddl(text, boolean, text) IS 'Return what a subscriber of a pipeline runs: tables, views that follow the version that serves, and a search by vector.';
