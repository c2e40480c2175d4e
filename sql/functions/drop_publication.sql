-- Drop a pipeline's publication. Drop the subscriptions first: a subscription without its publication stops.
-- SECURITY DEFINER, because a source's owner owns neither the publication nor the generated tables.
CREATE OR REPLACE FUNCTION embedline.drop_publication(pipeline_name text)
RETURNS void
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.replication import publication
    return publication.drop_publication(plpy, GD, pipeline_name)
$python$;

COMMENT ON FUNCTION embedline.drop_publication(text) IS 'Drop a pipeline''s publication, and the rights of the roles that subscribed to it.';
