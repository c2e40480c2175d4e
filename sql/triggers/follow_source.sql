-- ALTER TABLE on a source may rename a key column, which the capture functions name in plain text.
-- An error of ours must not fail the ALTER TABLE: it becomes a warning that names what to run.
CREATE OR REPLACE FUNCTION embedline._on_alter_table()
RETURNS event_trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    pipeline_name text;
BEGIN
    FOR pipeline_name IN
        SELECT DISTINCT p.name
        FROM pg_event_trigger_ddl_commands() AS c
        INNER JOIN embedline.pipeline AS p ON p.source = c.objid
        WHERE c.classid = 'pg_class'::regclass
    LOOP
        BEGIN
            PERFORM embedline._follow_source(pipeline_name);
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'embedline could not follow the change of the source of pipeline "%": %', pipeline_name, sqlerrm
                USING HINT = format('SELECT embedline.refresh_pipeline(%L);', pipeline_name);
        END;
    END LOOP;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._on_alter_table() IS 'Internal: event trigger function, follows renamed columns of sources.';

DROP EVENT TRIGGER IF EXISTS embedline_follow_source; -- noqa: PRS
CREATE EVENT TRIGGER embedline_follow_source
ON ddl_command_end
WHEN TAG IN ('ALTER TABLE')
EXECUTE FUNCTION embedline._on_alter_table();
