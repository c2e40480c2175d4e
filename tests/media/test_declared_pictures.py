"""Pipelines of pictures and of their addresses come, change and go by revisions, as an application declares them."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from application import Application
from support import scalar, settle

_NOTHING = "No new upgrade operations detected"
_TABLES = """
photo = sa.Table(
    "photo", metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("address", sa.Text),
    sa.Column("mirror", sa.Text),
    sa.Column("etag", sa.Text),
    sa.Column("size", sa.Integer),
    sa.Column("picture", sa.LargeBinary),
)
"""
_ADDRESSES = """
[pipelines.photo]
source = "public.photo"
content = "address"
changed_by = "etag"
caption = "etag"
model = "towers"
modality = "image"
"""
_FILES = '[pipelines.photo]\nsource = "public.photo"\ncontent = "picture"\nmodel = "towers"\nmodality = "image"\n'
_STORED = "SELECT modality, is_reference, document_prefix_expression FROM embedline.pipeline"


@pytest.fixture
def application(tmp_path: Path, database: psycopg.Connection, database_dsn: str, folder: Path) -> Application:
    """An application whose table photo has two rows, with addresses of a red and a blue picture."""
    app = Application(tmp_path, database_dsn)
    models = app.folder / "models.py"
    models.write_text(models.read_text(encoding="utf-8") + _TABLES, encoding="utf-8")
    app.autogenerate("photo")
    app.alembic("upgrade", "head")
    database.execute("INSERT INTO embedline.media_source VALUES (%s)", (f"file://{folder}/",))
    for key, name in enumerate(("red", "blue")):
        address = f"file://{folder}/{name}.png"
        database.execute("INSERT INTO photo VALUES (%s, %s, %s, '1', 1)", (key, address, address))
    return app


def test_a_declared_address_comes_changes_and_goes(application: Application, database: psycopg.Connection) -> None:
    application.declare(_ADDRESSES)
    (revision,) = application.autogenerate("watch photos")
    assert "content='address'" in revision
    assert "changed_by='etag'" in revision
    application.alembic("upgrade", "head")
    settle(database)
    assert scalar(database, "SELECT count(*) FROM photo_embedding") == 2
    assert _NOTHING in application.alembic("check")
    before = scalar(database, "SELECT content_expression FROM embedline.pipeline")
    application.declare(_ADDRESSES.replace('changed_by = "etag"', 'changed_by = "size::text"'))
    (revision,) = application.autogenerate("sizes")
    assert "op.alter_pipeline('photo', content='address', changed_by='size::text')" in revision
    assert "op.alter_pipeline('photo', content='address', changed_by='etag')" in revision
    application.alembic("upgrade", "head")
    assert _NOTHING in application.alembic("check")
    application.alembic("downgrade", "-1")
    assert scalar(database, "SELECT content_expression FROM embedline.pipeline") == before
    application.alembic("upgrade", "head")
    application.declare(_ADDRESSES.replace('content = "address"', 'content = "mirror"'))
    (revision,) = application.autogenerate("mirror")
    assert "op.alter_pipeline('photo', content='mirror', changed_by='etag')" in revision
    assert "op.alter_pipeline('photo', content='address', changed_by='size::text')" in revision


def test_a_pipeline_of_addresses_is_dropped_and_created_again(
    application: Application, database: psycopg.Connection
) -> None:
    application.declare(_ADDRESSES)
    application.autogenerate("watch photos")
    application.alembic("upgrade", "head")
    application.declare('[drop]\npipelines = ["photo"]\n')
    application.autogenerate("no longer")
    application.alembic("upgrade", "head")
    assert scalar(database, "SELECT count(*) FROM embedline.pipeline") == 0
    application.alembic("downgrade", "-1")
    assert database.execute(_STORED).fetchall() == [("image", True, "etag")]
    settle(database)
    assert scalar(database, "SELECT count(*) FROM photo_embedding") == 2


def test_a_pipeline_of_files_is_dropped_and_created_again(
    application: Application, database: psycopg.Connection
) -> None:
    application.declare(_FILES)
    application.autogenerate("watch photos")
    application.alembic("upgrade", "head")
    application.declare('[drop]\npipelines = ["photo"]\n')
    application.autogenerate("no longer")
    for direction in (("upgrade", "head"), ("downgrade", "-1")):
        application.alembic(*direction)
    assert database.execute(_STORED).fetchall() == [("image", False, None)]


def test_a_revision_that_has_run_already_finds_the_same_address(
    application: Application, database: psycopg.Connection
) -> None:
    application.declare(_ADDRESSES)
    application.autogenerate("watch photos")
    application.alembic("upgrade", "head")
    *_, before, revision = application.revisions()
    again = ("stamp", before.name.partition("_")[0])
    application.alembic(*again)
    application.alembic("upgrade", "head")
    for old, new, found in (
        ("changed_by='etag'", "changed_by='size::text'", "another changed_by: 'etag'"),
        ("changed_by='size::text',", "", "another changed_by: 'etag'"),
        ("content='address'", "content='mirror', changed_by='etag'", "another content: 'address'"),
    ):
        application.alembic(*again)
        application.rewrite(revision, old, new)
        assert found in application.alembic("upgrade", "head", fails=True)
        application.alembic("stamp", "head")


def test_a_pipeline_keeps_to_its_kind_of_contents(application: Application, database: psycopg.Connection) -> None:
    for first, changes in (
        (_ADDRESSES, (('changed_by = "etag"\n', "", "has no changed_by"), ('"image"', '"audio"', "image, not audio"))),
        (_FILES, (('"picture"', '"address"\nchanged_by = "etag"', "has changed_by"),)),
    ):
        application.declare(first)
        application.autogenerate("watch photos")
        application.alembic("upgrade", "head")
        for old, new, message in changes:
            application.declare(first.replace(old, new))
            assert message in application.alembic("check", fails=True)
        database.execute("SELECT embedline.drop_pipeline('photo')")


def test_a_script_has_what_an_address_changes_with(application: Application) -> None:
    application.declare(_ADDRESSES)
    application.autogenerate("watch photos")
    script = application.alembic("upgrade", "head", "--sql")
    assert "changed_by => 'etag'" in script
