"""`alembic revision --autogenerate` of an application beside an installed Embedline, through the real command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pytest_postgresql.executors import NoopExecutor

from application import PIPELINE, Application
from conftest import cloned_database, dbname_of
from support import MODELS, create_pipeline, scalar, settle

_NOTHING = "No new upgrade operations detected"


@pytest.fixture(scope="module")
def first_application(template_server: NoopExecutor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """An application whose table exists and has a few rows: each test begins with a copy of it and of its database."""
    with cloned_database(template_server, template_server.template_dbname) as dsn:
        app = Application(tmp_path_factory.mktemp("first"), dsn)
        app.autogenerate("article")
        app.alembic("upgrade", "head")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO article SELECT n, 'Title ' || n, 'Body ' || n FROM generate_series(1, 20) AS n"
            )
        yield app


@pytest.fixture
def database_dsn(
    first_application: Application, template_server: NoopExecutor, role_passwords: dict[str, str]
) -> Iterator[str]:
    """URI of a clone of the application's database."""
    with cloned_database(template_server, dbname_of(first_application.dsn)) as dsn:
        yield dsn


@pytest.fixture
def application(first_application: Application, tmp_path: Path, database_dsn: str) -> Application:
    """The application on the test's own database."""
    return first_application.copy(tmp_path, database_dsn)


def test_the_first_revision_holds_the_applications_table_and_nothing_else(application: Application) -> None:
    text = application.revisions()[0].read_text(encoding="utf-8")
    assert text.count("op.") == 2
    assert "op.create_table('article'" in text
    assert _NOTHING in application.alembic("check")


def test_generated_tables_views_and_indexes_are_left_alone(
    application: Application, database: psycopg.Connection
) -> None:
    create_pipeline(database, "article", "article", "title")
    settle(database)
    database.execute(scalar(database, "SELECT embedline.index_statement('article')"))
    assert _NOTHING in application.alembic("check")


def test_a_model_that_maps_the_routing_view_is_no_table_to_create(
    application: Application, database: psycopg.Connection
) -> None:
    models = application.folder / "models.py"
    models.write_text(
        models.read_text(encoding="utf-8")
        + 'sa.Table("article_embedding", metadata, sa.Column("id", sa.Integer), sa.Column("chunk", sa.Text))\n'
        + 'sa.Table("status", metadata, sa.Column("pipeline", sa.Text), schema="embedline")\n',
        encoding="utf-8",
    )
    application.declare()
    (revision,) = application.autogenerate("watch articles")
    assert "create_table" not in revision
    application.alembic("upgrade", "head")
    assert _NOTHING in application.alembic("check")


def test_a_declared_pipeline_is_created_and_dropped_again(
    application: Application, database: psycopg.Connection
) -> None:
    application.declare()
    (revision,) = application.autogenerate("watch articles")
    assert "op.create_pipeline(" in revision
    assert "op.drop_pipeline('article')" in revision
    application.alembic("upgrade", "head")
    settle(database)
    assert scalar(database, "SELECT count(*) FROM article_embedding") == 20
    assert _NOTHING in application.alembic("check")
    application.alembic("downgrade", "-1")
    assert scalar(database, "SELECT count(*) FROM embedline.pipeline") == 0


def test_a_table_and_its_pipeline_come_in_one_revision(application: Application, database: psycopg.Connection) -> None:
    models = application.folder / "models.py"
    models.write_text(
        models.read_text(encoding="utf-8")
        + 'sa.Table("note", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("text", sa.Text))\n',
        encoding="utf-8",
    )
    application.declare('[pipelines.note]\nsource = "note"\ncontent = "text"\nmodel = "static-256"\n')
    (revision,) = application.autogenerate("notes")
    assert revision.index("op.create_table('note'") < revision.index("op.create_pipeline(")
    assert revision.index("op.drop_pipeline('note'") < revision.index("op.drop_table('note'")
    for direction in (("upgrade", "head"), ("downgrade", "-1"), ("upgrade", "head")):
        application.alembic(*direction)
    assert scalar(database, "SELECT count(*) FROM embedline.pipeline") == 1


def test_a_declared_reranker_is_registered_although_no_pipeline_uses_it(
    application: Application, database: psycopg.Connection
) -> None:
    reranker = f'provider = "sentence-transformers"\nmodel = "{MODELS / "reranker"}"\ntask = "rerank"\n'
    application.declare(f"{PIPELINE}\n[models.reranker]\n{reranker}")
    (revision,) = application.autogenerate("rerank")
    assert "task='rerank'" in revision
    application.alembic("upgrade", "head")
    assert scalar(database, "SELECT task FROM embedline.model WHERE name = 'reranker'") == "rerank"
    assert _NOTHING in application.alembic("check")


def test_a_changed_model_becomes_a_chain_of_four_revisions(
    application: Application, database: psycopg.Connection
) -> None:
    application.declare()
    application.autogenerate("watch articles")
    application.alembic("upgrade", "head")
    application.declare(PIPELINE.replace("static-256", "minilm") + 'column_type = "halfvec"\n')
    assert "add_embedding_version" in application.alembic("check", fails=True)
    expand, index, cutover, contract = application.autogenerate("better search")
    assert "op.add_embedding_version('article', version=2, model='minilm', column_type='halfvec')" in expand
    assert "op.drop_embedding_version('article', version=2, rollback_window='0 hours')" in expand
    assert "op.build_vector_index('article', version=2)" in index
    assert "op.drop_vector_index('article', version=2)" in index
    assert "op.cutover_embedding_version('article', version=2)" in cutover
    assert "op.rollback_embedding_version('article', version=2)" in cutover
    assert "op.drop_embedding_version('article', version=1)" in contract
    assert (
        "op.restore_embedding_version(\n        'article',\n        version=1,\n        model='static-256'," in contract
    )
    assert "registration={'provider': 'sentence-transformers', " in contract
    application.alembic("upgrade", "+1")
    assert scalar(database, "SELECT count(*) FROM embedline.versions WHERE pipeline = 'article'") == 2
    application.alembic("downgrade", "-1")
    assert scalar(database, "SELECT count(*) FROM embedline.versions WHERE pipeline = 'article'") == 1


def test_the_environments_own_hook_still_numbers_its_revisions(application: Application) -> None:
    application.declare()
    application.autogenerate("watch articles")
    application.alembic("upgrade", "head")
    environment = application.folder / "migrations" / "env.py"
    hook = "def number(context, revision, directives):\n    directives[0].rev_id = '0003'\n\n\n"
    text = environment.read_text(encoding="utf-8").replace(
        "def run_migrations_online", hook + "def run_migrations_online"
    )
    environment.write_text(
        text.replace("include_schemas=True", "include_schemas=True, process_revision_directives=number"), encoding="utf-8"
    )  # fmt: skip
    application.declare(PIPELINE.replace("static-256", "minilm"))
    expand, index, *_ = application.autogenerate("better search")
    assert "revision: str = '0003'" in expand
    assert "= '0003'" in index


def test_changed_expressions_are_altered_in_place(application: Application, database: psycopg.Connection) -> None:
    application.declare(PIPELINE + 'filter = "live"\n')
    application.autogenerate("watch articles")
    application.alembic("upgrade", "head")
    application.declare(PIPELINE.replace("title || ': ' || body", "body"))
    (revision,) = application.autogenerate("bodies only")
    assert "op.alter_pipeline('article', content='body', drop=['filter'])" in revision
    application.alembic("upgrade", "head")
    assert _NOTHING in application.alembic("check")
    application.alembic("downgrade", "-1")
    stored = database.execute("SELECT content_expression, filter_expression FROM embedline.pipeline").fetchone()
    assert stored == ("title || ': ' || body", "live")


def test_a_declared_keyword_index_comes_changes_and_goes(
    application: Application, database: psycopg.Connection
) -> None:
    application.declare(PIPELINE + 'keyword = "English"\n')
    (revision,) = application.autogenerate("watch articles")
    assert "keyword='English'" in revision
    application.alembic("upgrade", "head")
    for name in ("English", "english", "pg_catalog.english"):
        application.declare(f'{PIPELINE}keyword = "{name}"\n')
        assert _NOTHING in application.alembic("check")
    application.declare(PIPELINE + 'keyword = "simple"\n')
    (revision,) = application.autogenerate("words as they are")
    assert "op.alter_pipeline('article', keyword='simple')" in revision
    assert "op.alter_pipeline('article', keyword='english')" in revision
    application.declare(PIPELINE)
    application.alembic("upgrade", "head")
    (revision,) = application.autogenerate("no words")
    assert "op.alter_pipeline('article', drop=['keyword'])" in revision
    application.alembic("upgrade", "head")
    application.alembic("downgrade", "-2")
    assert scalar(database, "SELECT keyword FROM embedline.pipeline") == "pg_catalog.english"


def test_a_pipeline_is_dropped_only_where_the_file_says_so(
    application: Application, database: psycopg.Connection
) -> None:
    create_pipeline(database, "by_hand", "article", "title", weight=2.0)
    application.declare("")
    assert _NOTHING in application.alembic("check")
    application.declare('[drop]\npipelines = ["by_hand", "never_there"]\n')
    (revision,) = application.autogenerate("no longer")
    application.alembic("upgrade", "head")
    assert scalar(database, "SELECT count(*) FROM embedline.pipeline") == 0
    assert _NOTHING in application.alembic("check")
    application.alembic("downgrade", "-1")
    assert scalar(database, "SELECT weight FROM embedline.pipeline WHERE name = 'by_hand'") == 2.0
    assert revision.count("by_hand") == 2


def test_a_source_that_is_no_name_of_a_table_is_refused(application: Application) -> None:
    for source in ("public.a b c", "public.", ".article", 'public."article', "a.b.c.d", "elsewhere.public.article"):
        application.declare(PIPELINE.replace('"public.article"', f"'{source}'"))
        assert f"source {source!r} is no name of a table" in application.alembic("check", fails=True)


def test_a_source_that_does_not_exist_yet_comes_with_its_revision(application: Application) -> None:
    for source in ("public.not-yet", 'public . "Not ""yet"""', "2024_article"):
        application.declare(PIPELINE.replace('"public.article"', f"'{source}'"))
        assert "create_pipeline" in application.alembic("check", fails=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PIPELINE.replace("public.article", "alembic_version"), "op.move_pipeline"),
        (PIPELINE + '[models.static-256]\nprovider = "openai"\nmodel = "other"\n', "registered with another provider"),
        (PIPELINE.replace("model =", "modell ="), 'has no key "modell"'),
        (PIPELINE.replace("static-256", "static"), 'names model "static", which is neither registered nor declared'),
    ],
)
def test_what_no_operation_does_is_refused(application: Application, text: str, message: str) -> None:
    application.declare()
    application.autogenerate("watch articles")
    application.alembic("upgrade", "head")
    application.declare(text)
    assert message in application.alembic("check", fails=True)


def test_alembic_utils_is_proposed_no_drop_of_our_functions_views_triggers_and_grants(
    application: Application, database: psycopg.Connection
) -> None:
    create_pipeline(database, "article", "article", "title", index_method="none")
    database.execute("CREATE FUNCTION mine() RETURNS integer LANGUAGE sql RETURN 1")
    database.execute("CREATE VIEW titles AS SELECT title FROM article")
    database.execute("GRANT SELECT ON titles TO embedline_reader")
    models = application.folder / "models.py"
    registration = (
        "from alembic_utils.replaceable_entity import register_entities\n\n"
        'register_entities([], schemas=["public", "embedline", "embedline_data"])\n'
    )
    models.write_text(models.read_text(encoding="utf-8") + registration, encoding="utf-8")
    found = application.alembic("check", fails=True).partition("FAILED: ")[2]
    assert sorted(re.findall(r"'(PG\w+: [^']+)'", found)) == [
        "PGFunction: public.mine()",
        "PGGrantTable: public.titles.embedline_reader.SELECT",
        "PGView: public.titles",
    ]


def test_a_declaration_without_embedline_in_the_database_says_how_to_install_it(
    tmp_path: Path, empty_database_dsn: str
) -> None:
    application = Application(tmp_path, empty_database_dsn)
    assert "op.create_table('article'" in application.autogenerate("article")[0]
    application.alembic("upgrade", "head")
    application.declare()
    assert "embedline upgrade" in application.alembic("check", fails=True)
