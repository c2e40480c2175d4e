-- Publish a pipeline for servers that only search, or bring its publication up to date.
-- Locks: the published tables SHARE UPDATE EXCLUSIVE, which blocks no write. SECURITY DEFINER, because a source's owner
-- owns none of the generated tables.
CREATE OR REPLACE FUNCTION embedline.publication(
    pipeline_name text,
    with_source boolean DEFAULT NULL,
    source_filter text DEFAULT NULL,
    tables_created boolean DEFAULT FALSE,
    subscriber_role text DEFAULT NULL
)
RETURNS TABLE (publication text, published_table text, is_new boolean)
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.replication import publication
    return publication.publication(
        plpy, GD, pipeline_name, with_source, source_filter, tables_created, subscriber_role
    )
$python$;

COMMENT ON FUNCTION embedline.publication(text, boolean, text, boolean, text) IS 'Publish a pipeline: exactly the tables with which a subscriber searches. tables_created says that its subscribers have the tables of a new version.';
