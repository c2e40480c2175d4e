"""Keep what an index reaches: a row for each version whose index was looked at, and a schema for the functions that rank.

What: table embedline.index_reach, schema embedline_search. The replay that follows writes the functions of existing pipelines
and their tables of rows that are ranked exactly. Lock: none on any table of the user. How long: under a second. Undo:
`alembic downgrade 0010`, which drops both with the functions and those tables.

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

UPGRADE = (
    "CREATE SCHEMA embedline_search",
    "REVOKE ALL ON SCHEMA embedline_search FROM public",
    "COMMENT ON SCHEMA embedline_search IS 'Generated functions that rank the chunks of each version; embedline.search calls them'",
    """
    CREATE TABLE embedline.index_reach (
        version_id bigint CONSTRAINT index_reach_pkey PRIMARY KEY
            CONSTRAINT index_reach_version_id_fkey REFERENCES embedline.version ON DELETE CASCADE,
        checked_to bigint NOT NULL DEFAULT 0,
        pending_to bigint,
        pending_xact xid8,
        pending_writers text[],
        ef_search integer CONSTRAINT index_reach_ef_search_check CHECK (ef_search BETWEEN 1 AND 1000),
        wide_ef_search integer CONSTRAINT index_reach_wide_ef_search_check CHECK (wide_ef_search BETWEEN 1 AND 1000),
        far_distance double precision,
        recall_target real,
        recall real,
        measures jsonb,
        measured_at timestamptz,
        measured_rows bigint
    )
    """,
    "COMMENT ON TABLE embedline.index_reach IS "
    "'How a version is searched: what its index was found to reach, and with which hnsw.ef_search'",
    "COMMENT ON COLUMN embedline.index_reach.checked_to IS "
    "'Chunks after this one are ranked exactly beside the index, the newest first: no check has looked at them yet'",
    "COMMENT ON COLUMN embedline.index_reach.pending_to IS 'checked_to of the next check, once the writers of that time have ended'",
    "COMMENT ON COLUMN embedline.index_reach.pending_xact IS 'Transaction that fixed pending_to: the check goes on in a later one'",
    "COMMENT ON COLUMN embedline.index_reach.pending_writers IS 'Transactions that wrote vectors when pending_to was fixed'",
    "COMMENT ON COLUMN embedline.index_reach.ef_search IS 'Smallest hnsw.ef_search at which usual queries reach recall_target'",
    "COMMENT ON COLUMN embedline.index_reach.wide_ef_search IS "
    "'The same for queries whose best hit is farther than far_distance; NULL: these are ranked exactly'",
    "COMMENT ON COLUMN embedline.index_reach.far_distance IS "
    "'Distance of a best hit beyond which a query is off the centre of the texts and is searched again, wider'",
    "COMMENT ON COLUMN embedline.index_reach.recall IS 'Lowest recall@10 of the kinds of queries, as search answers them'",
    "COMMENT ON COLUMN embedline.index_reach.measures IS 'Queries, ef_search and recall@10 of each kind of query'",
    "COMMENT ON COLUMN embedline.index_reach.measured_rows IS 'Vectors of the version when it was measured'",
)

DOWNGRADE = (
    "DROP SCHEMA embedline_search CASCADE",
    """
    DO $do$
    DECLARE
        doomed regclass;
    BEGIN
        FOR doomed IN
            SELECT c.oid::regclass FROM embedline.pipeline AS p JOIN embedline.version AS v USING (pipeline_id)
            JOIN pg_catalog.pg_class AS c ON c.relname = p.name || '_v' || v.number || '_exact'
                AND c.relnamespace = 'embedline_data'::regnamespace
        LOOP
            EXECUTE format('DROP TABLE %s', doomed);
        END LOOP;
    END
    $do$
    """,
    # The replay of the code before writes them again.
    "DROP VIEW IF EXISTS embedline.status, embedline.versions",
    "DROP TABLE embedline.index_reach",
    "DELETE FROM embedline.setting WHERE name = 'index_recall_target'",
    # The functions that the code before knows are written again by its replay.
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
