-- Resident worker: claims, embeds without an open transaction, writes; until max_seconds are over or it is to stop.
-- It commits, so it can have neither SECURITY DEFINER nor a SET clause: names are qualified and work is delegated.
CREATE OR REPLACE PROCEDURE embedline.run_worker(
    max_seconds double precision DEFAULT 1200,
    pipeline_name text DEFAULT NULL,
    slot integer DEFAULT NULL,
    until_idle boolean DEFAULT false
)
LANGUAGE plpython3u
AS $python$
    from embedline.worker import procedure
    procedure.run_worker(plpy, GD, max_seconds, pipeline_name, slot, until_idle)
$python$;

COMMENT ON PROCEDURE embedline.run_worker(double precision, text, integer, boolean) IS 'Run a resident worker in this session; until_idle => true ends it when nothing waits any more.';
