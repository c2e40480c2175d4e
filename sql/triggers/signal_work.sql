-- Trigger function of inboxes and outboxes: tell workers that something waits, once for each transaction.
-- What a transaction queues for a pipeline leaves one row in embedline.signal, so that an idle worker asks one table
-- and not those of each pipeline. Only inserts: no lock that an application waits for. The setting holds to the end of
-- the transaction, or to the savepoint that takes the row back with it. Processor time of the application's session:
-- 1.3 µs for each row whose content an UPDATE changes (of 7 to 8), 10 to 20 µs for a transaction of one row (of 65).
CREATE OR REPLACE FUNCTION embedline._signal_work()
RETURNS trigger
LANGUAGE plpgsql
AS $plpgsql$
BEGIN
    IF pg_catalog.current_setting('embedline.signalled', true) IS DISTINCT FROM tg_argv[0] THEN
        INSERT INTO embedline.signal (pipeline) VALUES (tg_argv[0]);
        PERFORM pg_catalog.set_config('embedline.signalled', tg_argv[0], true);
    END IF;
    RETURN NULL;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._signal_work() IS 'Internal: trigger function of queues, tells workers that something waits.';
