-- Verify and repair every pipeline, purge old dead letters, roll the ledger up; commits after each pipeline. It
-- commits, so it can have neither SECURITY DEFINER nor a SET clause. Therefore names are qualified and work is
-- delegated.
CREATE OR REPLACE PROCEDURE embedline.run_nightly(repair boolean DEFAULT true)
LANGUAGE plpython3u
AS $python$
    from embedline.verify import nightly
    nightly.run_nightly(plpy, GD, repair)
$python$;

COMMENT ON PROCEDURE embedline.run_nightly(boolean) IS 'Verify and repair every pipeline, purge old dead letters, roll the ledger of usage up. pg_cron runs it each night.';
