-- Delete dead letters older than a given age, by default the setting dead_letter_retention; returns how many.
CREATE OR REPLACE FUNCTION embedline.purge_dead_letters(older_than interval DEFAULT NULL)
RETURNS bigint
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET intervalstyle = 'postgres'
AS $python$
    from embedline.queue import dead_letters
    return dead_letters.purge_dead_letters(plpy, GD, older_than)
$python$;

COMMENT ON FUNCTION embedline.purge_dead_letters(interval) IS 'Delete old dead letters of all pipelines. Their rows are not retried unless they change.';
