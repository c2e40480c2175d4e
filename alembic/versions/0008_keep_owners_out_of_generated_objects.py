"""Take USAGE on embedline_data from the sources' owners: the functions of their expressions move to a schema of their own.

An owner who could name the other generated functions could have them run with the rights of their caller. What: schema
embedline_expression; all generated functions are written anew by the replay that follows. Lock: none on any table. How
long: under a second. Undo: `alembic downgrade 0007`.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# The functions of all pipelines' expressions, from one schema to another.
_MOVE = """
    DO $do$
    DECLARE
        moved regprocedure;
    BEGIN
        FOR moved IN
            SELECT f.oid::regprocedure FROM embedline.pipeline AS p
            CROSS JOIN unnest('{{content,filter,prefix,tenant_value}}'::text[]) AS suffix
            JOIN pg_catalog.pg_proc AS f ON f.proname = p.name || '_' || suffix AND f.pronamespace = '{old}'::regnamespace
        LOOP
            EXECUTE format('ALTER FUNCTION %s SET SCHEMA {new}', moved);
        END LOOP;
    END
    $do$
"""
_OWNERS = """
    DO $do$
    DECLARE
        holder text;
    BEGIN
        FOR holder IN {roles} LOOP
            EXECUTE format('{statement}', holder);
        END LOOP;
    END
    $do$
"""
_HOLDERS = """
    SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
    FROM pg_catalog.pg_namespace AS n, pg_catalog.aclexplode(n.nspacl) AS a
    WHERE n.nspname = 'embedline_data' AND a.grantee <> n.nspowner
"""
_SOURCE_OWNERS = """
    SELECT DISTINCT c.relowner::regrole::text
    FROM embedline.pipeline AS p JOIN pg_catalog.pg_class AS c ON c.oid = p.source
"""

UPGRADE = (
    "CREATE SCHEMA embedline_expression",
    "REVOKE ALL ON SCHEMA embedline_expression FROM public",
    "COMMENT ON SCHEMA embedline_expression IS "
    "'Embedline: the functions of users'' expressions, which belong to the sources'' owners; not a public interface'",
    _MOVE.format(old="embedline_data", new="embedline_expression"),
    _OWNERS.format(roles=_HOLDERS, statement="REVOKE ALL ON SCHEMA embedline_data FROM %s CASCADE"),
    # An owner may have altered them: the replay that follows writes all of them anew.
    "UPDATE embedline.pipeline SET code_version = 0",
)

DOWNGRADE = (
    _MOVE.format(old="embedline_expression", new="embedline_data"),
    "DROP SCHEMA embedline_expression",
    _OWNERS.format(roles=_SOURCE_OWNERS, statement="GRANT USAGE ON SCHEMA embedline_data TO %s"),
    # The next replay at head makes the functions anew that name the old schema in plain text.
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
