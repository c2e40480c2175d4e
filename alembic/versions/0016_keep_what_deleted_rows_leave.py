"""Leave what is stored of deleted rows to the workers: tables of deleted keys, hidden keys and vectors to lend.

What: embedline_data.<pipeline>_deleted, <pipeline>_hidden and <pipeline>_lent; triggers, views and searches are written again
by the replay that follows. Lock: none on any table that is there. How long: under a second. Undo: `alembic downgrade 0015`;
keys that wait go to the inbox, and documents whose chunks are hidden are embedded again. The first two tables stay, empty,
because views and functions read them until the next replay.

Revision ID: 0016
Revises: 0015
"""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

_SETTINGS = (
    "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,"
    " autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000"
)

UPGRADE = (
    f"""
    DO $do$
    DECLARE
        pipeline record;
        deleted text;
        hidden text;
        lent text;
        key_name name;
    BEGIN
        FOR pipeline IN
            SELECT p.name, p.key_columns, c.relowner::regrole::text AS owner,
                (SELECT string_agg(quote_ident(k.name), ', ' ORDER BY k.position)
                 FROM unnest(p.key_columns) WITH ORDINALITY AS k (name, position)) AS keys
            FROM embedline.pipeline AS p LEFT JOIN pg_catalog.pg_class AS c ON c.oid = p.source
            WHERE to_regclass(format('embedline_data.%I', p.name || '_inbox')) IS NOT NULL
        LOOP
            deleted := format('embedline_data.%I', pipeline.name || '_deleted');
            hidden := format('embedline_data.%I', pipeline.name || '_hidden');
            -- A downgrade leaves the first two.
            EXECUTE format('CREATE TABLE IF NOT EXISTS %s (LIKE embedline_data.%I INCLUDING DEFAULTS) WITH ({_SETTINGS})',
                deleted, pipeline.name || '_inbox');
            EXECUTE format('ALTER TABLE %s ADD COLUMN IF NOT EXISTS seen_at timestamptz', deleted);
            EXECUTE format('COMMENT ON TABLE %s IS %L', deleted,
                'Keys of deleted rows: workers remove what is stored of them once no earlier change can use the vectors');
            EXECUTE format('COMMENT ON COLUMN %s.seen_at IS %L', deleted,
                'When no earlier change waited any more; versions beside the serving one may still have chunks of it to embed');
            EXECUTE format('CREATE TABLE IF NOT EXISTS %s WITH ({_SETTINGS}) AS SELECT %s FROM embedline_data.%I WITH NO DATA',
                hidden, pipeline.keys, pipeline.name || '_document');
            FOREACH key_name IN ARRAY pipeline.key_columns LOOP
                EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET NOT NULL', hidden, key_name);
            END LOOP;
            EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON %s (%s)', pipeline.name || '_hidden_key_idx', hidden,
                pipeline.keys);
            EXECUTE format('COMMENT ON TABLE %s IS %L', hidden,
                'Keys whose stored chunks are those of an earlier row of the same key: views and searches leave them out');
            lent := format('embedline_data.%I', pipeline.name || '_lent');
            EXECUTE format('CREATE TABLE %s (version_id bigint NOT NULL, content_hash uuid NOT NULL, vector bytea NOT NULL,'
                ' kept_at timestamptz NOT NULL DEFAULT now())', lent);
            EXECUTE format('CREATE INDEX %I ON %s (content_hash)', pipeline.name || '_lent_hash_idx', lent);
            EXECUTE format('COMMENT ON TABLE %s IS %L', lent,
                'Vectors of chunks that a new row of the same key has replaced, until no earlier change waits that could use'
                ' them');
            EXECUTE format('CREATE TRIGGER embedline_signal AFTER INSERT ON %s FOR EACH STATEMENT'
                ' EXECUTE FUNCTION embedline._signal_work(%L)', deleted, pipeline.name);
            EXECUTE format('CREATE TRIGGER embedline_signal AFTER INSERT ON %s FOR EACH STATEMENT'
                ' EXECUTE FUNCTION embedline._signal_work(%L)', lent, pipeline.name);
            EXECUTE format('REVOKE ALL ON TABLE %s, %s, %s FROM public', deleted, hidden, lent);
            EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', deleted);
            EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', hidden);
            EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', lent);
            EXECUTE format('GRANT SELECT ON %s TO embedline_reader', hidden);
            IF pipeline.owner IS NOT NULL THEN
                EXECUTE format('GRANT SELECT ON %s, %s, %s TO %s', deleted, hidden, lent, pipeline.owner);
            END IF;
        END LOOP;
    END
    $do$
    """,
)

DOWNGRADE = (
    """
    DO $do$
    DECLARE
        pipeline record;
        stored text;
    BEGIN
        FOR pipeline IN
            SELECT p.pipeline_id, p.name,
                (SELECT string_agg(quote_ident(k.name), ', ' ORDER BY k.position)
                 FROM unnest(p.key_columns) WITH ORDINALITY AS k (name, position)) AS keys,
                (SELECT string_agg(format('t.%1$I = h.%1$I', k.name), ' AND ')
                 FROM unnest(p.key_columns) AS k (name)) AS same
            FROM embedline.pipeline AS p
            WHERE to_regclass(format('embedline_data.%I', p.name || '_deleted')) IS NOT NULL
        LOOP
            EXECUTE format('INSERT INTO embedline_data.%I (%s, enqueued_at) SELECT %s, enqueued_at FROM embedline_data.%I',
                pipeline.name || '_inbox', pipeline.keys, pipeline.keys, pipeline.name || '_deleted');
            FOR stored IN
                SELECT pipeline.name || CASE WHEN s.number = 1 THEN '_chunk' ELSE '_chunk_' || s.number END
                FROM embedline.chunk_set AS s WHERE s.pipeline_id = pipeline.pipeline_id
                UNION ALL SELECT pipeline.name || '_document'
            LOOP
                EXECUTE format('DELETE FROM embedline_data.%I AS t USING embedline_data.%I AS h WHERE %s', stored,
                    pipeline.name || '_hidden', pipeline.same);
            END LOOP;
            EXECUTE format('TRUNCATE embedline_data.%I, embedline_data.%I', pipeline.name || '_deleted',
                pipeline.name || '_hidden');
            EXECUTE format('DROP TABLE embedline_data.%I', pipeline.name || '_lent');
            EXECUTE format('DROP TRIGGER embedline_signal ON embedline_data.%I', pipeline.name || '_deleted');
            -- Revisions before drop what it calls. Until the replay, triggers hide every new row: the look for it fails.
            FOR stored IN
                SELECT f.oid::regprocedure::text FROM pg_catalog.pg_proc AS f
                WHERE f.pronamespace = 'embedline_data'::regnamespace AND f.proname = pipeline.name || '_foreign'
            LOOP
                EXECUTE format('DROP FUNCTION %s', stored);
            END LOOP;
        END LOOP;
    END
    $do$
    """,
    # The next replay at head writes views and functions that read neither table.
    "UPDATE embedline.pipeline SET code_version = 0",
)


def _run(statements: tuple[str, ...]) -> None:
    for statement in statements:
        if op.get_context().as_sql:
            op.get_context().impl.static_output(statement + ";")
        else:
            # Plain execution would take ":name" and "%" in the statement for parameters.
            op.get_bind().exec_driver_sql(statement, execution_options={"no_parameters": True})


def upgrade() -> None:
    _run(UPGRADE)


def downgrade() -> None:
    _run(DOWNGRADE)
