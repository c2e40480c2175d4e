-- Count the waiting changes in a pipeline's generated tables, for embedline.status. If nothing waits it takes 0.02 to
-- 0.1 ms, because 1,000 pipelines must be shown in 0.3 s. Planning the count takes 0.2 ms.
-- Up to 10,000 rows of each table are counted, which takes 3 ms; a table of 1,000,000 rows took 0.2 s. Above that the
-- rest of the table is estimated by its size, because every scrape and every check for alerts counts. The oldest change
-- is then the oldest of the counted ones: applications append, so those at the front are the oldest.
CREATE OR REPLACE FUNCTION embedline._pipeline_counts(pipeline_name text)
RETURNS TABLE (pending bigint, oldest_enqueued_at timestamptz, last_row_error text)
LANGUAGE plpgsql
STABLE
ROWS 1
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- A scan that begins in the middle of a table would not meet the oldest rows.
SET synchronize_seqscans = off
AS $plpgsql$
DECLARE
    counted_rows CONSTANT integer := 10000;
    key_column text;
    suffix text;
    filled text [] := '{}';
    relation regclass;
    found_count bigint;
    found_keys bigint;
    found_oldest timestamptz;
    found_error text;
    first_block bigint;
    last_block bigint;
BEGIN
    pending := 0;
    -- Reading a size locks nothing for longer. Most queues are empty, and need no subtransaction then.
    FOREACH suffix IN ARRAY '{inbox,outbox,claim,deleted}'::text [] LOOP
        IF pg_relation_size(to_regclass(format('embedline_data.%I', pipeline_name || '_' || suffix))) > 0 THEN
            filled := filled || suffix;
        END IF;
    END LOOP;
    IF filled = '{}' THEN
        RETURN NEXT;
        RETURN;
    END IF;
    BEGIN
        FOREACH suffix IN ARRAY filled LOOP
            relation := format('embedline_data.%I', pipeline_name || '_' || suffix)::regclass;
            EXECUTE format('SELECT FROM %s LIMIT 1', relation);
            GET DIAGNOSTICS found_count = ROW_COUNT;
            CONTINUE WHEN found_count = 0;
            IF suffix <> 'outbox' AND key_column IS NULL THEN
                SELECT p.key_columns[1] INTO key_column FROM embedline.pipeline AS p WHERE p.name = pipeline_name;
            END IF;
            EXECUTE format(
                'SELECT count(*), sum(r.keys), min(r.enqueued_at), (array_agg(r.error) FILTER (WHERE r.error IS NOT NULL))[1], '
                '(min(r.place)::text::point)[0], (max(r.place)::text::point)[0] FROM ('
                'SELECT t.ctid AS place, %s FROM %s AS t LIMIT $1) AS r',
                -- What waits for a provider's batch is not late.
                CASE WHEN suffix = 'outbox' THEN '1 AS keys, t.last_error AS error,'
                        ' CASE WHEN t.not_before < clock_timestamp() + interval ''1 hour'' THEN t.enqueued_at END AS enqueued_at'
                    ELSE format('cardinality(t.%I) AS keys, NULL::text AS error, t.enqueued_at', key_column) END,
                relation
            ) INTO found_count, found_keys, found_oldest, found_error, first_block, last_block USING counted_rows;
            IF found_count = counted_rows THEN
                -- The blocks behind those that were read, at the same density.
                found_keys := found_keys + found_keys * greatest(
                    pg_relation_size(relation) / current_setting('block_size')::bigint - 1 - last_block, 0
                ) / (last_block - first_block + 1);
            END IF;
            pending := pending + coalesce(found_keys, 0);
            oldest_enqueued_at := least(oldest_enqueued_at, found_oldest);
            last_row_error := coalesce(last_row_error, embedline._shown_error(found_error));
        END LOOP;
        -- Roll the block back, because one transaction cannot hold the locks of 1,000 pipelines' tables.
        RAISE EXCEPTION USING ERRCODE = 'EL000';
    EXCEPTION
        WHEN SQLSTATE 'EL000' OR undefined_table THEN
            -- The counts are done, or another session is dropping the pipeline.
            NULL;
    END;
    RETURN NEXT;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._pipeline_counts(text) IS 'Internal: count a pipeline''s queue.';
