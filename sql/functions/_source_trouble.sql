-- Return the trouble of a pipeline's source, for embedline.status. NULL if the source is there with the same key. The
-- catalogue is read each time, because it also shows commands that event triggers do not see.
CREATE OR REPLACE FUNCTION embedline._source_trouble(pipeline_number bigint)
RETURNS TABLE (state text, message text, remedy text)
LANGUAGE plpgsql
STABLE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    watched embedline.pipeline;
    label text;
    namesake oid;
    columns text;
    keys_there integer;
    has_key boolean;
BEGIN
    SELECT * INTO watched FROM embedline.pipeline AS p WHERE p.pipeline_id = pipeline_number;
    SELECT c.oid::regclass::text INTO label FROM pg_class AS c WHERE c.oid = watched.source;
    SELECT c.oid INTO namesake FROM pg_class AS c
    WHERE c.oid = to_regclass(watched.source_name) AND c.oid <> watched.source AND c.relkind IN ('r', 'p');
    IF label IS NULL OR namesake IS NOT NULL THEN
        RETURN QUERY SELECT
            CASE WHEN label IS NULL THEN 'source gone' ELSE 'source replaced' END,
            CASE
                WHEN namesake IS NULL THEN format('the source %s was dropped', watched.source_name)
                WHEN label IS NULL THEN format('the source was dropped, and another table is named %s now', watched.source_name)
                ELSE format('the source is named %s now, and another table is named %s', label, watched.source_name)
            END,
            CASE
                WHEN namesake IS NULL THEN format('SELECT embedline.drop_pipeline(%L);', watched.name)
                ELSE format('SELECT embedline.move_pipeline(%L, %L);', watched.name, watched.source_name)
            END;
        RETURN;
    END IF;
    SELECT count(*), string_agg(quote_ident(a.attname), ', ') INTO keys_there, columns
    FROM unnest(watched.key_attributes) AS k (number)
    INNER JOIN pg_attribute AS a ON a.attrelid = watched.source AND a.attnum = k.number AND NOT a.attisdropped;
    IF keys_there = cardinality(watched.key_attributes) AND NOT watched.is_resting AND EXISTS (
        SELECT FROM pg_index AS i
        WHERE i.indrelid = watched.source AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
            AND (i.indkey::smallint [])[0:i.indnkeyatts - 1] @> watched.key_attributes
            AND (i.indkey::smallint [])[0:i.indnkeyatts - 1] <@ watched.key_attributes
    ) THEN
        RETURN QUERY SELECT NULL::text, NULL::text, NULL::text;
        RETURN;
    END IF;
    has_key := EXISTS (
        SELECT FROM pg_index AS i
        WHERE i.indrelid = watched.source AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
            AND NOT EXISTS (
                SELECT FROM pg_attribute AS a WHERE a.attrelid = i.indrelid AND NOT a.attnotnull
                    AND a.attnum = ANY ((i.indkey::smallint [])[0:i.indnkeyatts - 1])
            )
    );
    RETURN QUERY SELECT
        CASE WHEN has_key THEN 'key changed' ELSE 'key lost' END,
        format(CASE WHEN has_key THEN 'the key of %s is another one now' ELSE '%s has no key any more' END, label),
        CASE
            WHEN has_key THEN format('SELECT embedline.refresh_pipeline(%L);', watched.name)
            ELSE format('ALTER TABLE %s ADD PRIMARY KEY (%s);', label, coalesce(columns, '...'))
        END;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._source_trouble(bigint) IS 'Internal: return the trouble of a source and the statement to run, for embedline.status.';
