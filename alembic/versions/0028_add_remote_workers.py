"""Let workers outside the database embed.

What: role embedline_remote, which has no right but the functions of remote workers. Table remote_grant, which says whose workers
may have the texts of a pipeline. Column embedline.worker.login. Lock: ACCESS EXCLUSIVE on embedline.worker for an instant; none on any
table of the user. How long: under a second. Undo: `alembic downgrade 0027`; the grants are lost, and remote workers end with
an error.

Revision ID: 0028
Revises: 0027
"""

from __future__ import annotations

from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

UPGRADE = (
    """
    DO $do$
    BEGIN
        -- Roles belong to the whole server: another database may have created it.
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'embedline_remote') THEN
            CREATE ROLE embedline_remote NOLOGIN;
        END IF;
    END
    $do$
    """,
    """
    CREATE TABLE embedline.remote_grant (
        pipeline_id bigint NOT NULL
            CONSTRAINT remote_grant_pipeline_id_fkey REFERENCES embedline.pipeline (pipeline_id) ON DELETE CASCADE,
        role_name text NOT NULL,
        is_exclusive boolean NOT NULL,
        granted_by text NOT NULL,
        granted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT remote_grant_pkey PRIMARY KEY (pipeline_id, role_name)
    )
    """,
    "COMMENT ON TABLE embedline.remote_grant IS 'Roles whose remote workers may have the texts of a pipeline'",
    "COMMENT ON COLUMN embedline.remote_grant.is_exclusive IS"
    " 'True: workers in the database leave the embedding to remote workers'",
    "REVOKE ALL ON TABLE embedline.remote_grant FROM public",
    "ALTER TABLE embedline.worker ADD COLUMN login text",
    "COMMENT ON COLUMN embedline.worker.login IS 'Login of a remote worker; NULL for a worker in the database'",
)

DOWNGRADE = (
    "ALTER TABLE embedline.worker DROP COLUMN login",
    "DROP TABLE embedline.remote_grant",
    """
    DO $do$
    BEGIN
        REVOKE ALL ON ALL ROUTINES IN SCHEMA embedline FROM embedline_remote;
        REVOKE ALL ON SCHEMA embedline FROM embedline_remote;
        DROP ROLE IF EXISTS embedline_remote;
    EXCEPTION WHEN dependent_objects_still_exist THEN
        RAISE NOTICE 'role embedline_remote stays: another database or an object of yours uses it';
    END
    $do$
    """,
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
