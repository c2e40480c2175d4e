-- Event trigger before ALTER TABLE and ALTER TYPE: find the columns of sources again in a restored database.
-- They are found before a command can rename one, because afterwards nothing would identify it. An error of ours must
-- not fail the command.
CREATE OR REPLACE FUNCTION embedline._on_before_alter()
RETURNS event_trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM embedline._resolve_attributes();
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING 'embedline could not find the columns of its sources: %', sqlerrm;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._on_before_alter() IS 'Internal: event trigger function that finds the columns of sources again after a restore.';

DROP EVENT TRIGGER IF EXISTS embedline_resolve_attributes; -- noqa: PRS
CREATE EVENT TRIGGER embedline_resolve_attributes
ON ddl_command_start
WHEN TAG IN ('ALTER TABLE', 'ALTER TYPE')
EXECUTE FUNCTION embedline._on_before_alter();
