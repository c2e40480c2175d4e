"""Index words beside vectors, and let each version say how it is searched.

What: columns keyword of embedline.pipeline and search_mode of embedline.version, table keyword_build. No pipeline has a
keyword index afterwards; alter_pipeline gives it one. Lock: ACCESS EXCLUSIVE on embedline.pipeline and embedline.version for
an instant; none on any table of the user. How long: under a second. Undo: `alembic downgrade 0020`; keyword indexes are
dropped, no row or vector is.

Revision ID: 0021
Revises: 0020
"""

from __future__ import annotations

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

# The functions that rank a version's chunks return other columns, so the following regeneration cannot replace them.
_DROP_RANKING = r"""
    DO $body$
    DECLARE
        object record;
    BEGIN
        FOR object IN
            SELECT p.oid::regprocedure::text AS signature FROM pg_catalog.pg_proc AS p
            INNER JOIN embedline.pipeline AS l ON p.proname ~ ('^' || l.name || '_v\d+_(nearest|search|beside|ranked)$')
            WHERE p.pronamespace = 'embedline_search'::regnamespace
        LOOP
            EXECUTE format('DROP FUNCTION %s', object.signature);
        END LOOP;
    END
    $body$
"""

UPGRADE = (
    _DROP_RANKING,
    "DROP FUNCTION IF EXISTS embedline.search(text, text, integer, boolean, integer, text, text)",
    "DROP FUNCTION IF EXISTS embedline.evaluate(text, integer, regclass, integer, double precision, integer, name, bigint,"
    " double precision)",
    "DROP FUNCTION IF EXISTS embedline.create_pipeline(text, regclass, text, text, text, text, integer, integer, text, text,"
    " text, jsonb, text, text, text, double precision, jsonb, text)",
    "DROP FUNCTION IF EXISTS embedline.alter_pipeline(text, text, text, text, text, text, integer, integer, jsonb,"
    " double precision, text [], text)",
    "ALTER TABLE embedline.pipeline ADD COLUMN keyword text",
    "COMMENT ON COLUMN embedline.pipeline.keyword IS 'Text search configuration of the keyword index; NULL without one'",
    "ALTER TABLE embedline.version ADD COLUMN search_mode text NOT NULL DEFAULT 'vector'"
    " CONSTRAINT version_search_mode_check CHECK (search_mode IN ('vector', 'keyword', 'hybrid'))",
    "COMMENT ON COLUMN embedline.version.search_mode IS 'What search does without a mode; use_mode sets it'",
    "ALTER TABLE embedline.version ADD COLUMN search_mode_reason text",
    "COMMENT ON COLUMN embedline.version.search_mode_reason IS 'Why the mode was set without a passing evaluation'",
    "ALTER TABLE embedline.evaluation DROP CONSTRAINT evaluation_kind_check",
    "ALTER TABLE embedline.evaluation ADD CONSTRAINT evaluation_kind_check CHECK (kind IN ('gate', 'preview', 'mode'))",
    """
    CREATE TABLE embedline.keyword_build (
        chunk_set_id bigint NOT NULL,
        built_to bigint NOT NULL DEFAULT 0,
        build_to bigint NOT NULL,
        begun_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT keyword_build_pkey PRIMARY KEY (chunk_set_id),
        CONSTRAINT keyword_build_chunk_set_id_fkey FOREIGN KEY (chunk_set_id) REFERENCES embedline.chunk_set ON DELETE CASCADE
    )
    """,
    "COMMENT ON TABLE embedline.keyword_build IS 'How far the chunks are indexed that are older than their keyword index'",
    "COMMENT ON COLUMN embedline.keyword_build.built_to IS 'Chunks up to this id are indexed'",
    "COMMENT ON COLUMN embedline.keyword_build.build_to IS 'Last chunk when the index was created; later ones are indexed as they are written'",
)

DOWNGRADE = (
    _DROP_RANKING,
    "DROP FUNCTION IF EXISTS embedline.search(text, text, integer, boolean, integer, text, text, text, double precision,"
    " double precision, integer, integer, text, text, boolean, text)",
    "DROP FUNCTION IF EXISTS embedline.evaluate(text, integer, regclass, integer, double precision, integer, name, bigint,"
    " double precision, text)",
    "DROP FUNCTION IF EXISTS embedline.use_mode(text, text, integer, text)",
    "DROP FUNCTION IF EXISTS embedline.create_pipeline(text, regclass, text, text, text, text, integer, integer, text, text,"
    " text, jsonb, text, text, text, double precision, jsonb, text, text)",
    "DROP FUNCTION IF EXISTS embedline.alter_pipeline(text, text, text, text, text, text, integer, integer, jsonb,"
    " double precision, text, text [], text)",
    r"""
    DO $body$
    DECLARE
        object record;
    BEGIN
        FOR object IN
            SELECT p.oid::regprocedure::text AS signature FROM pg_catalog.pg_proc AS p
            INNER JOIN embedline.pipeline AS l ON p.proname ~ ('^' || l.name || '_v\d+_keyword_(terms|read|shown)$')
            WHERE p.pronamespace = 'embedline_search'::regnamespace
        LOOP
            EXECUTE format('DROP FUNCTION %s', object.signature);
        END LOOP;
        FOR object IN
            SELECT c.oid::regclass::text AS name FROM pg_catalog.pg_class AS c
            INNER JOIN embedline.pipeline AS l ON c.relname ~ ('^' || l.name || '_keyword_(\d+_)?(entry|segment|page)$')
            WHERE c.relnamespace = 'embedline_data'::regnamespace AND c.relkind = 'r'
        LOOP
            EXECUTE format('DROP TABLE %s', object.name);
        END LOOP;
    END
    $body$
    """,
    "DROP TABLE embedline.keyword_build",
    "DELETE FROM embedline.evaluation WHERE kind = 'mode'",
    "ALTER TABLE embedline.evaluation DROP CONSTRAINT evaluation_kind_check",
    "ALTER TABLE embedline.evaluation ADD CONSTRAINT evaluation_kind_check CHECK (kind IN ('gate', 'preview'))",
    "ALTER TABLE embedline.version DROP COLUMN search_mode, DROP COLUMN search_mode_reason",
    "ALTER TABLE embedline.pipeline DROP COLUMN keyword",
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
