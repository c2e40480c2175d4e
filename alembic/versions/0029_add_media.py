"""Let pipelines embed images and recordings.

What: columns embedline.pipeline.modality and is_reference, which say what the content is, and embedline.model.modalities, which says
what a model makes vectors of. Table media_source, which lists where files may be fetched. Three ways of cutting files. create_pipeline
and alter_pipeline take a caption and changed_by. Lock: ACCESS EXCLUSIVE on the three tables for
an instant; none on any table of the user. How long: under a second. Undo: `alembic downgrade 0028`, which is refused while a pipeline
embeds images or recordings.

Revision ID: 0029
Revises: 0028
"""

from __future__ import annotations

from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None

_TEXT_METHODS = "'recursive', 'sentences', 'markdown', 'fixed', 'semantic', 'none'"
UPGRADE = (
    "ALTER TABLE embedline.pipeline ADD COLUMN modality text NOT NULL DEFAULT 'text'"
    " CONSTRAINT pipeline_modality_check CHECK (modality IN ('text', 'image', 'audio'))",
    "COMMENT ON COLUMN embedline.pipeline.modality IS 'What the content is: text, image or audio'",
    "ALTER TABLE embedline.pipeline ADD COLUMN is_reference boolean NOT NULL DEFAULT false",
    "COMMENT ON COLUMN embedline.pipeline.is_reference IS 'True: rows hold the address of a file in its place'",
    """
    CREATE TABLE embedline.media_source (
        prefix text NOT NULL,
        CONSTRAINT media_source_pkey PRIMARY KEY (prefix),
        CONSTRAINT media_source_prefix_check CHECK (
            prefix ~ '^(file:///|s3://[^/@]+/|https?://[^/@]+/).*' AND right(prefix, 1) = '/'
            AND prefix !~ '[[:space:]?#]|/[.][.]?/')
    )
    """,
    "COMMENT ON TABLE embedline.media_source IS"
    " 'Beginnings of addresses under which files of rows may be fetched; a superuser edits it'",
    "REVOKE ALL ON TABLE embedline.media_source FROM public",
    "ALTER TABLE embedline.model ADD COLUMN modalities text[] NOT NULL DEFAULT '{text}'",
    "COMMENT ON COLUMN embedline.model.modalities IS 'What the model makes vectors of: text, image, audio'",
    "ALTER TABLE embedline.chunk_set DROP CONSTRAINT chunk_set_chunking_check",
    f"ALTER TABLE embedline.chunk_set ADD CONSTRAINT chunk_set_chunking_check CHECK (chunking IN ({_TEXT_METHODS},"
    " 'tiles', 'windows', 'silence')) NOT VALID",
    # The replay that follows creates them with more parameters.
    "DROP FUNCTION IF EXISTS embedline.create_pipeline(text, regclass, text, text, text, text, integer, integer, text, text,"
    " text, jsonb, text, text, text, double precision, jsonb, text, text)",
    "DROP FUNCTION IF EXISTS embedline.alter_pipeline(text, text, text, text, text, text, integer, integer, jsonb,"
    " double precision, text, text[], text)",
)

DOWNGRADE = (
    """
    DO $do$
    DECLARE
        media text := (SELECT min(name) FROM embedline.pipeline WHERE modality <> 'text');
    BEGIN
        IF media IS NOT NULL THEN
            RAISE EXCEPTION 'pipeline "%" embeds images or recordings, which revision 0028 does not know', media
                USING ERRCODE = 'object_not_in_prerequisite_state',
                HINT = format('SELECT embedline.drop_pipeline(%L);', media);
        END IF;
    END
    $do$
    """,
    "DROP FUNCTION IF EXISTS embedline.create_pipeline(text, regclass, text, text, text, text, integer, integer, text, text,"
    " text, jsonb, text, text, text, double precision, jsonb, text, text, text, text, text)",
    "DROP FUNCTION IF EXISTS embedline.alter_pipeline(text, text, text, text, text, text, integer, integer, jsonb,"
    " double precision, text, text[], text, text, text)",
    "DROP FUNCTION IF EXISTS embedline.search(text, bytea, integer, boolean, integer, text, text, text, text, boolean,"
    " text)",
    "DROP FUNCTION IF EXISTS embedline.embed_query(text, bytea), embedline.search_across(text[], text, integer, boolean),"
    " embedline.search_across(text[], bytea, integer, boolean)",
    "ALTER TABLE embedline.chunk_set DROP CONSTRAINT chunk_set_chunking_check",
    f"ALTER TABLE embedline.chunk_set ADD CONSTRAINT chunk_set_chunking_check CHECK (chunking IN ({_TEXT_METHODS})) NOT VALID",
    "ALTER TABLE embedline.model DROP COLUMN modalities",
    "DROP TABLE embedline.media_source",
    "ALTER TABLE embedline.pipeline DROP COLUMN modality, DROP COLUMN is_reference",
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
