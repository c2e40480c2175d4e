-- Find the columns of all pipelines again, by their names, in a restored database. A dump translates names, but not
-- attribute numbers. A restore renumbers the columns if one had been dropped.
CREATE OR REPLACE FUNCTION embedline._resolve_attributes()
RETURNS void
LANGUAGE plpgsql
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    -- An oid alone could be the same in another cluster by chance.
    here text := (
        SELECT s.system_identifier || '/' || d.oid || '/'
        FROM pg_control_system() AS s CROSS JOIN pg_database AS d WHERE d.datname = current_database()
    );
    restored embedline.pipeline;
    columns jsonb;
    moved jsonb;
    lost text;
BEGIN
    FOR restored IN
        SELECT p.* FROM embedline.pipeline AS p INNER JOIN pg_class AS c ON c.oid = p.source
        WHERE p.attributes_of IS DISTINCT FROM here || p.source::oid
    LOOP
        SELECT jsonb_object_agg(a.attnum, a.attname) INTO columns FROM pg_attribute AS a
        WHERE a.attrelid = restored.source AND a.attnum > 0 AND NOT a.attisdropped;
        -- From the old number to the new one.
        SELECT jsonb_object_agg(o.key, n.key::smallint) INTO moved
        FROM jsonb_each_text(restored.source_columns) AS o INNER JOIN jsonb_each_text(columns) AS n ON n.value = o.value;
        SELECT coalesce(restored.source_columns ->> k::text, k::text) INTO lost
        FROM unnest(restored.key_attributes || restored.input_attributes) AS k WHERE moved ->> k::text IS NULL LIMIT 1;
        IF lost IS NOT NULL THEN
            RAISE EXCEPTION 'column "%" of the source of pipeline "%" was not found after a restore', lost, restored.name
                USING ERRCODE = 'undefined_column',
                HINT = format('SELECT embedline.drop_pipeline(%L), then create it again.', restored.name);
        END IF;
        UPDATE embedline.pipeline AS p
        SET
            key_attributes = (
                SELECT array_agg((moved ->> k.number::text)::smallint ORDER BY k.position)
                FROM unnest(p.key_attributes) WITH ORDINALITY AS k (number, position)
            ),
            input_attributes = coalesce((
                SELECT array_agg((moved ->> k.number::text)::smallint ORDER BY k.position)
                FROM unnest(p.input_attributes) WITH ORDINALITY AS k (number, position)
            ), '{}'),
            input_columns = coalesce((
                SELECT jsonb_object_agg(e.suffix, (
                    SELECT coalesce(jsonb_agg(moved -> k.number ORDER BY k.position), '[]')
                    FROM jsonb_array_elements_text(e.columns) WITH ORDINALITY AS k (number, position)
                )) FROM jsonb_each(p.input_columns) AS e (suffix, columns)
            ), '{}'),
            view_attributes = coalesce((
                SELECT jsonb_object_agg(v.key, moved -> v.value) FROM jsonb_each_text(p.view_attributes) AS v
                WHERE moved ? v.value
            ), '{}'),
            source_columns = columns,
            attributes_of = here || p.source::oid
        WHERE p.pipeline_id = restored.pipeline_id;
    END LOOP;
END
$plpgsql$;

COMMENT ON FUNCTION embedline._resolve_attributes() IS 'Internal: find the columns of pipelines again after a dump and restore.';
