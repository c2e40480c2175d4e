"""Let publications hold our tables, and one statement of a worker ask for all pipelines.

What: REPLICA IDENTITY FULL for tables of ours without a primary key: the inboxes; table embedline.signal, and triggers of each
inbox and outbox that write to it. Lock: ACCESS EXCLUSIVE on each inbox, SHARE ROW EXCLUSIVE on each outbox, for an instant.
How long: under a second. Undo: `alembic downgrade` to the revision before.

Revision ID: 0014
Revises: 0013
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_EACH_TABLE = """
    DO $do$
    DECLARE
        affected regclass;
    BEGIN
        FOR affected IN
            SELECT c.oid::regclass FROM pg_catalog.pg_class AS c
            WHERE c.relnamespace IN ('embedline'::regnamespace, 'embedline_data'::regnamespace) AND c.relkind = 'r'
                AND c.relreplident = '{before}'
                AND NOT EXISTS (SELECT FROM pg_catalog.pg_index AS i WHERE i.indrelid = c.oid AND i.indisprimary)
        LOOP
            EXECUTE format('ALTER TABLE %s REPLICA IDENTITY {after}', affected);
        END LOOP;
    END
    $do$
"""

_EACH_PIPELINE = """
    DO $do$
    DECLARE
        pipeline record;
    BEGIN
        FOR pipeline IN SELECT p.name FROM embedline.pipeline AS p LOOP
            {commands}
        END LOOP;
    END
    $do$
"""

UPGRADE = (
    _EACH_TABLE.format(before="d", after="FULL"),
    # Unlogged: neither WAL nor a place in a publication. After a crash a worker that begins has every pipeline looked at.
    """
    CREATE UNLOGGED TABLE embedline.signal (
        pipeline text NOT NULL,
        due_at timestamptz NOT NULL DEFAULT now()
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, vacuum_truncate = false)
    """,
    "ALTER TABLE embedline.signal REPLICA IDENTITY FULL",
    "COMMENT ON TABLE embedline.signal IS 'Pipelines in whose queue something may be due: left by each transaction that queues something, taken by workers'",
    "COMMENT ON COLUMN embedline.signal.due_at IS 'When to look at the queue'",
    "REVOKE ALL ON TABLE embedline.signal FROM public",
    "CREATE INDEX version_backfilling_idx ON embedline.version (pipeline_id) WHERE state = 'backfilling'",
    # The replay that follows writes it again; the triggers need it now.
    """
    CREATE FUNCTION embedline._signal_work() RETURNS trigger LANGUAGE plpgsql AS $plpgsql$
    BEGIN
        INSERT INTO embedline.signal (pipeline) VALUES (tg_argv[0]);
        RETURN NULL;
    END
    $plpgsql$
    """,
    _EACH_PIPELINE.format(
        commands="""
            EXECUTE format('CREATE TRIGGER embedline_signal AFTER INSERT ON embedline_data.%I FOR EACH STATEMENT'
                ' EXECUTE FUNCTION embedline._signal_work(%L)', pipeline.name || '_inbox', pipeline.name);
            EXECUTE format('CREATE TRIGGER embedline_signal AFTER INSERT OR UPDATE ON embedline_data.%I FOR EACH STATEMENT'
                ' EXECUTE FUNCTION embedline._signal_work(%L)', pipeline.name || '_outbox', pipeline.name);"""
    ),
)

DOWNGRADE = (
    _EACH_PIPELINE.format(
        commands="""
            EXECUTE format('DROP TRIGGER IF EXISTS embedline_signal ON embedline_data.%I', pipeline.name || '_inbox');
            EXECUTE format('DROP TRIGGER IF EXISTS embedline_signal ON embedline_data.%I', pipeline.name || '_outbox');"""
    ),
    "DROP FUNCTION embedline._signal_work()",
    "DROP INDEX embedline.version_backfilling_idx",
    "DROP TABLE embedline.signal",
    _EACH_TABLE.format(before="f", after="DEFAULT"),
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
