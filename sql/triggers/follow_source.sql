-- Event trigger on ALTER TABLE, TYPE, DOMAIN, SCHEMA and EXTENSION: have pipelines follow their sources' names, types,
-- owner and parent.
-- The capture functions and embedline.pipeline name some properties in plain text, which may change: the key's columns
-- and types, the owner, and the parent table. Often the command names something else: the parent of a partition, a
-- type, a schema. So the stored properties are compared with the present ones, whichever object the command names.
-- An error of ours must not fail the command, so it becomes a warning with the statement to run.
CREATE OR REPLACE FUNCTION embedline._on_alter_table()
RETURNS event_trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    changed text [];
    pipeline_name text;
BEGIN
    BEGIN
        SELECT array_agg(p.name ORDER BY p.pipeline_id) INTO changed
        FROM embedline.pipeline AS p INNER JOIN pg_class AS s ON s.oid = p.source
        WHERE p.source IN (SELECT c.objid FROM pg_event_trigger_ddl_commands() AS c WHERE c.classid = 'pg_class'::regclass)
            OR p.source_columns IS DISTINCT FROM (
                SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_attribute AS a
                WHERE a.attrelid = p.source AND a.attnum > 0 AND NOT a.attisdropped
            )
            OR p.key_types <> (
                SELECT array_agg(format_type(a.atttypid, a.atttypmod) ORDER BY k.position)
                FROM unnest(p.key_columns) WITH ORDINALITY AS k (name, position)
                INNER JOIN pg_attribute AS a ON a.attname = k.name
                    AND a.attrelid = to_regclass(format('embedline_data.%I', p.name || '_document'))
            )
            OR EXISTS (
                SELECT FROM pg_proc AS f
                WHERE f.pronamespace = 'embedline_data'::regnamespace AND f.proname = p.name || '_read'
                    AND f.proowner <> s.relowner
            )
            OR (p.capture = 'statement' AND EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = p.source));
    EXCEPTION WHEN OTHERS THEN
        RAISE WARNING 'embedline could not look for changes of its sources: %', sqlerrm;
        RETURN;
    END;
    FOREACH pipeline_name IN ARRAY coalesce(changed, '{}') LOOP
        BEGIN
            PERFORM embedline._follow_source(pipeline_name);
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'embedline could not follow the change of the source of pipeline "%": %', pipeline_name, sqlerrm
                USING HINT = format('SELECT embedline.refresh_pipeline(%L);', pipeline_name);
        END;
    END LOOP;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._on_alter_table() IS 'Internal: event trigger function that follows changes of the sources.';

DROP EVENT TRIGGER IF EXISTS embedline_follow_source; -- noqa: PRS
CREATE EVENT TRIGGER embedline_follow_source
ON ddl_command_end
WHEN TAG IN ('ALTER TABLE', 'ALTER TYPE', 'ALTER DOMAIN', 'ALTER SCHEMA', 'ALTER EXTENSION')
EXECUTE FUNCTION embedline._on_alter_table();
