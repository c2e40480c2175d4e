-- Run a resident worker: claim, embed without an open transaction, write, until max_seconds are over or it must stop.
-- It commits, so it can have neither SECURITY DEFINER nor a SET clause. Therefore names are qualified and work is
-- delegated.
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

COMMENT ON PROCEDURE embedline.run_worker(double precision, text, integer, boolean) IS 'Run a resident worker in this session. until_idle => true ends it when nothing waits any more.';
