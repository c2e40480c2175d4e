"""Give every table a replica identity, so that publications may hold them.

What: REPLICA IDENTITY FULL for tables of ours without a primary key: the inboxes. Lock: ACCESS EXCLUSIVE on each for an instant.
How long: under a second. Undo: `alembic downgrade 0011`.

Revision ID: 0014
Revises: 0011
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0011"
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

UPGRADE = (_EACH_TABLE.format(before="d", after="FULL"),)

DOWNGRADE = (_EACH_TABLE.format(before="f", after="DEFAULT"),)


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
