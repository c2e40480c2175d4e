"""Let a version have an IVFFlat index.

What: index method ivfflat of embedline.version, and columns of embedline.index_reach for its probes and its lists. Lock: ACCESS
EXCLUSIVE on embedline.version and embedline.index_reach for an instant; none on any table of the user. How long: under a
second. Undo: `alembic downgrade 0025`; IVFFlat indexes are dropped and their versions have no index. Searches of them are exact
until a cutover to a version with another index.

Revision ID: 0026
Revises: 0025
"""

from __future__ import annotations

from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None

UPGRADE = (
    "ALTER TABLE embedline.version DROP CONSTRAINT version_index_method_check",
    "ALTER TABLE embedline.version ADD CONSTRAINT version_index_method_check"
    " CHECK (index_method IN ('hnsw', 'ivfflat', 'none'))",
    "ALTER TABLE embedline.index_reach ADD COLUMN probes integer"
    " CONSTRAINT index_reach_probes_check CHECK (probes BETWEEN 1 AND 32768)",
    "ALTER TABLE embedline.index_reach ADD COLUMN wide_probes integer"
    " CONSTRAINT index_reach_wide_probes_check CHECK (wide_probes BETWEEN 1 AND 32768)",
    "ALTER TABLE embedline.index_reach ADD COLUMN index_node oid",
    "ALTER TABLE embedline.index_reach ADD COLUMN built_rows bigint",
    "ALTER TABLE embedline.index_reach ADD COLUMN built_probes integer",
    "ALTER TABLE embedline.index_reach ADD COLUMN built_recall real",
    "ALTER TABLE embedline.index_reach ADD COLUMN kept_recall real",
    "COMMENT ON COLUMN embedline.index_reach.probes IS"
    " 'Of an IVFFlat index, in place of ef_search: smallest ivfflat.probes at which usual queries reach recall_target'",
    "COMMENT ON COLUMN embedline.index_reach.wide_probes IS"
    " 'The same for queries whose best hit is farther than far_distance; NULL: these are ranked exactly'",
    "COMMENT ON COLUMN embedline.index_reach.index_node IS 'File of the IVFFlat index to which the columns after this one belong'",
    "COMMENT ON COLUMN embedline.index_reach.built_rows IS 'Vectors of the version when its lists were built'",
    "COMMENT ON COLUMN embedline.index_reach.built_probes IS 'probes of the first measurement after the build'",
    "COMMENT ON COLUMN embedline.index_reach.built_recall IS 'recall@10 of that measurement with built_probes'",
    "COMMENT ON COLUMN embedline.index_reach.kept_recall IS 'recall@10 of the last measurement with built_probes'",
)

DOWNGRADE = (
    """
    DO $do$
    DECLARE
        doomed regclass;
    BEGIN
        FOR doomed IN
            SELECT c.oid::regclass FROM embedline.pipeline AS p JOIN embedline.version AS v USING (pipeline_id)
            JOIN pg_catalog.pg_class AS c ON c.relname IN (
                    p.name || '_v' || v.number || '_embedding_idx', p.name || '_v' || v.number || '_next_idx')
                AND c.relnamespace = 'embedline_data'::regnamespace
            WHERE v.index_method = 'ivfflat'
        LOOP
            EXECUTE format('DROP INDEX %s', doomed);
        END LOOP;
    END
    $do$
    """,
    "UPDATE embedline.version SET index_method = 'none', index_options = '{}' WHERE index_method = 'ivfflat'",
    "ALTER TABLE embedline.version DROP CONSTRAINT version_index_method_check",
    "ALTER TABLE embedline.version ADD CONSTRAINT version_index_method_check CHECK (index_method IN ('hnsw', 'none')) NOT VALID",
    # The replay of the code before writes them again.
    "DROP VIEW IF EXISTS embedline.status, embedline.versions",
    "ALTER TABLE embedline.index_reach DROP COLUMN probes, DROP COLUMN wide_probes, DROP COLUMN index_node,"
    " DROP COLUMN built_rows, DROP COLUMN built_probes, DROP COLUMN built_recall, DROP COLUMN kept_recall",
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
