"""An application upgrades its pipeline's model with revisions of its own, through the real alembic and embedline commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from pytest_postgresql.executors import NoopExecutor

from application import PIPELINE, Application
from conftest import MakeRole, cloned_database, dbname_of
from generated_names import Generated
from small_models import register_static
from support import scalar, wait_until
from working import Worker

ROWS = 40


@pytest.fixture(scope="module")
def watched(template_server: NoopExecutor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """An application whose table is watched by a pipeline that its own second revision created; all is embedded."""
    with cloned_database(template_server, template_server.template_dbname) as dsn:
        app = Application(tmp_path_factory.mktemp("watched"), dsn)
        app.autogenerate("article")
        app.alembic("upgrade", "head")
        with psycopg.connect(dsn) as connection:
            connection.execute(
                "INSERT INTO article SELECT n, 'Title ' || n,"
                " 'Body ' || n || (ARRAY[' rivers', ' law', ' bread'])[1 + n %% 3] FROM generate_series(1, %s) AS n",
                (ROWS,),
            )
        app.declare()
        app.autogenerate("watch articles")
        app.alembic("upgrade", "head")
        _work(dsn)
        yield app


@pytest.fixture
def database_dsn(watched: Application, template_server: NoopExecutor, role_passwords: dict[str, str]) -> Iterator[str]:
    """URI of a clone of the application's database."""
    with cloned_database(template_server, dbname_of(watched.dsn)) as dsn:
        yield dsn


@pytest.fixture
def application(watched: Application, tmp_path: Path, database_dsn: str) -> Application:
    """The application once more, on the test's own database."""
    return watched.copy(tmp_path, database_dsn)


@pytest.fixture
def chain(application: Application) -> Iterator[list[Path]]:
    """The four revisions of an upgrade to minilm; a gate takes more articles than these, so the cutover overrides it."""
    application.run(
        "embedline", "upgrade-model", "article", "--model", "minilm", "--rollback-window", "0 hours"
    )  # fmt: skip
    written = application.revisions()[-4:]
    application.rewrite(
        written[2], "version=2)\n    # ### end Alembic commands ###\n\n\ndef downgrade",
        "version=2, override_reason='a test')\n    # ### end Alembic commands ###\n\n\ndef downgrade",
    )  # fmt: skip
    yield written


def _work(dsn: str) -> None:
    worker = Worker(dsn, until_idle=True)
    worker.join(120)
    assert worker.error is None


def _versions(connection: psycopg.Connection) -> dict[int, str]:
    query = "SELECT version, CASE WHEN serving THEN 'serves' ELSE state END FROM embedline.versions WHERE pipeline = 'article'"
    return dict(connection.execute(query).fetchall())


def _at(application: Application) -> str:
    return application.alembic("current").split()[0]


def _revision_id(path: Path) -> str:
    return path.name.partition("_")[0]


def _index_is_valid(connection: psycopg.Connection) -> Any:
    query = (
        "SELECT bool_and(i.indisvalid) FROM pg_index AS i"
        f" WHERE i.indexrelid = to_regclass('{Generated('article').index(2)}')"
    )
    return scalar(connection, query)


def test_an_application_upgrades_its_model_with_revisions_of_its_own(
    application: Application, chain: list[Path], database: psycopg.Connection
) -> None:
    assert [path.stem.partition("_")[2] for path in chain] == [
        f"{phase}_version_2_of_article" for phase in ("expand", "index", "cutover", "contract")
    ]
    application.alembic("upgrade", "+1")
    assert _versions(database) == {1: "serves", 2: "backfilling"}

    refused = application.alembic("upgrade", "head", fails=True)
    assert 'version 2 of pipeline "article" is not filled yet: no row is chunked yet' in refused
    assert _at(application) == _revision_id(chain[0])

    _work(application.dsn)
    application.alembic("upgrade", "+2")
    assert _versions(database) == {1: "complete", 2: "serves"}
    assert _index_is_valid(database)

    database.execute("INSERT INTO article VALUES (1000, 'After', 'the cutover')")
    database.execute("DELETE FROM article WHERE id = 1")
    _work(application.dsn)
    application.alembic("downgrade", "-1")
    assert _versions(database) == {1: "serves", 2: "complete"}
    ids = {row[0] for row in database.execute("SELECT id FROM article_embedding WHERE embedding IS NOT NULL")}
    assert ids == {*range(2, ROWS + 1), 1000}

    application.alembic("upgrade", "head")
    assert _versions(database) == {2: "serves"}
    assert scalar(database, f"SELECT to_regclass('{Generated('article').version(1)}') IS NULL")
    refused = application.alembic("downgrade", "-1", fails=True)
    assert _versions(database) == {2: "serves"}
    assert scalar(database, "SELECT count(*) FROM alembic_version") == 1
    declared = PIPELINE.replace("static-256", "minilm")
    application.declare(
        declared + '[models.static-256]\nprovider = "sentence-transformers"\nmodel = "/srv/static-256"\n'
    )
    assert "No new upgrade operations detected" in application.alembic("check")

    # What the refusal says to run leads to the old model.
    application.declare(declared)
    registration = re.search(r"SELECT embedline\.create_model\(.*?\);", refused)
    command = re.search(r"embedline (upgrade-model article --model static-256)", refused)
    assert registration
    assert command
    database.execute(registration[0])
    application.run("embedline", *command[1].split())
    application.alembic("upgrade", "+1")
    assert _versions(database) == {2: "serves", 3: "backfilling"}


def test_a_history_with_an_upgrade_in_it_runs_from_zero(application: Application, database: psycopg.Connection) -> None:
    """As a new environment runs it: no worker, no row, and no time for a window."""
    application.run("embedline", "upgrade-model", "article", "--model", register_static(database, 64))
    application.alembic("downgrade", "base")
    assert scalar(database, "SELECT to_regclass('article') IS NULL")

    application.alembic("upgrade", "head")
    assert _versions(database) == {2: "serves"}
    assert _index_is_valid(database)
    assert scalar(database, "SELECT override_reason FROM embedline.cutover") == "the pipeline is empty"
    database.execute("INSERT INTO article VALUES (1, 'The first', 'of a new environment')")
    _work(application.dsn)
    assert scalar(database, "SELECT count(*) FROM article_embedding") == 1


def test_the_index_waits_for_the_backfill(
    application: Application, chain: list[Path], database: psycopg.Connection
) -> None:
    application.rewrite(
        chain[1],
        "build_vector_index('article', version=2)",
        "build_vector_index('article', version=2, wait_seconds=60)",
    )
    process = application.start("alembic", "upgrade", "+2")
    wait_until(lambda: 2 in _versions(database), 60, "the expansion is committed")
    _work(application.dsn)
    messages = process.communicate(timeout=60)[1]
    assert process.returncode == 0, messages
    assert _index_is_valid(database)


def test_the_chain_goes_all_the_way_down_before_its_contract(
    application: Application, chain: list[Path], database: psycopg.Connection
) -> None:
    application.alembic("upgrade", "+1")
    _work(application.dsn)
    for _ in range(2):
        application.alembic("upgrade", _revision_id(chain[2]))
        assert _versions(database) == {1: "complete", 2: "serves"}
        application.alembic("downgrade", _revision_id(chain[0]))
        assert _versions(database) == {1: "serves", 2: "complete"}
        assert _index_is_valid(database) is None
    application.alembic("downgrade", "-1")
    assert _versions(database) == {1: "serves"}
    application.alembic("upgrade", "+1")
    assert _versions(database) == {1: "serves", 2: "backfilling"}


@pytest.mark.parametrize("phase", [0, 1, 2, 3])
def test_a_chain_killed_before_alembic_noted_a_phase_is_run_again(
    application: Application, chain: list[Path], database: psycopg.Connection, phase: int
) -> None:
    """kill -9 between the work of a phase and the update of the version table, which a lock of ours holds up."""
    for earlier in chain[:phase]:
        application.alembic("upgrade", _revision_id(earlier))
        _work(application.dsn)
    with psycopg.connect(application.dsn) as holder:
        holder.execute("LOCK TABLE alembic_version IN EXCLUSIVE MODE")
        process = application.start("alembic", "upgrade", "+1")
        waits = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock' AND query LIKE 'UPDATE alembic_version%'"
        )
        wait_until(lambda: database.execute(waits).fetchone(), 60, "alembic wants to note the revision")
        backend = scalar(database, waits)
        process.kill()
        process.communicate()
        database.execute("SELECT pg_terminate_backend(%s)", (backend,))
    assert _at(application) == _revision_id(chain[phase - 1] if phase else application.revisions()[1])
    application.alembic("upgrade", _revision_id(chain[phase]))
    _work(application.dsn)
    if phase < 3:
        application.alembic("upgrade", "head")
    assert _versions(database) == {2: "serves"}
    assert scalar(database, "SELECT count(*) FROM embedline.cutover") == 1
    assert scalar(database, "SELECT count(*) FROM article_embedding WHERE embedding IS NOT NULL") == ROWS


def test_an_index_build_that_was_killed_is_built_anew(
    application: Application, chain: list[Path], database: psycopg.Connection
) -> None:
    application.alembic("upgrade", "+1")
    _work(application.dsn)
    with psycopg.connect(application.dsn) as holder:
        # CONCURRENTLY waits for those who may write to the table, after it has entered the index as invalid.
        holder.execute(f"LOCK TABLE {Generated('article').version(2)} IN ROW EXCLUSIVE MODE")
        process = application.start("alembic", "upgrade", "+1")
        wait_until(lambda: _index_is_valid(database) is False, 60, "the build has begun")
        process.kill()
        process.communicate()
        # Of this database: other tests build indexes on the same server.
        builders = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND state = 'active' AND query LIKE 'CREATE INDEX%'"
        )
        assert scalar(database, builders) == 1
    assert _index_is_valid(database) is False
    application.alembic("upgrade", "+1")
    assert _index_is_valid(database)


def test_a_version_of_another_number_or_recipe_is_refused(
    application: Application, chain: list[Path], database: psycopg.Connection
) -> None:
    database.execute("SELECT embedline.add_embedding_version('article', 'static-256', column_type => 'halfvec')")
    assert "exists already with another model" in application.alembic("upgrade", "+1", fails=True)
    application.rewrite(chain[0], "version=2, model", "version=4, model")
    assert "is 3, the revision says 4" in application.alembic("upgrade", "+1", fails=True)
    assert sorted(_versions(database)) == [1, 2]


def test_a_cutover_without_a_passing_gate_is_refused(
    application: Application, chain: list[Path], database: psycopg.Connection
) -> None:
    application.rewrite(chain[2], "override_reason='a test'", "evaluate=False")
    application.alembic("upgrade", "+1")
    _work(application.dsn)
    refused = application.alembic("upgrade", "+2", fails=True)
    assert "HINT" in refused
    assert _at(application) == _revision_id(chain[1])
    assert _versions(database) == {1: "serves", 2: "complete"}


def test_the_gate_runs_once_as_a_part_of_the_upgrade(application: Application, database: psycopg.Connection) -> None:
    """The same model in halfvec finds the same; a passing gate that is stored is not run again after a rollback."""
    database.execute("CREATE SCHEMA quality")
    database.execute(
        "CREATE TABLE quality.canary AS SELECT title || ' ' || body || ' ' || word AS query, id::text AS key"
        " FROM public.article, unnest('{about,find,show,read,why,how,where,when,who,what}'::text[]) AS word"
    )
    application.run(
        "embedline", "upgrade-model", "article", "--model", "static-256", "--column-type", "halfvec",
        "--canaries", "quality.canary",
    )  # fmt: skip
    cutover = application.revisions()[-2]
    application.alembic("upgrade", "+1")
    _work(application.dsn)
    for _ in range(2):
        application.alembic("upgrade", _revision_id(cutover))
        assert _versions(database) == {1: "complete", 2: "serves"}
        application.alembic("downgrade", "-1")
    gates = database.execute("SELECT verdict, query_source, query_count FROM embedline.evaluation").fetchall()
    assert gates == [("pass", "canary", 10 * ROWS)]


def _by_hand(application: Application, upgrade: str, downgrade: str) -> None:
    """Write a revision with these statements."""
    before = set(application.revisions())
    application.alembic("revision", "-m", "by hand")
    (path,) = set(application.revisions()) - before
    for name, statement in (("Upgrade", upgrade), ("Downgrade", downgrade)):
        application.rewrite(path, f'"""{name} schema."""\n    pass', f'"""{name} schema."""\n    {statement}')


def test_a_mode_is_used_after_its_evaluation_and_undone(application: Application, database: psycopg.Connection) -> None:
    database.execute(
        "CREATE TABLE canary AS SELECT title || ' ' || body || ' ' || word AS query, id::text AS key"
        " FROM article, unnest('{about,find,show,read,why,how,where,when,who,what}'::text[]) AS word"
    )
    _by_hand(
        application, "op.alter_pipeline('article', keyword='english')", "op.alter_pipeline('article', drop=['keyword'])"
    )
    _by_hand(
        application, "op.use_mode('article', version=1, mode='hybrid', canaries='canary')",
        "op.use_mode('article', version=1, mode='vector')",
    )  # fmt: skip
    refused = application.alembic("upgrade", "head", fails=True)
    assert "the keyword index of pipeline" in refused
    _work(application.dsn)
    for _ in range(2):
        application.alembic("upgrade", "head")
        assert scalar(database, "SELECT search_mode FROM embedline.version") == "hybrid"
    evidence = database.execute("SELECT kind, verdict, evidence ->> 'mode' FROM embedline.evaluation").fetchall()
    assert evidence == [("mode", "pass", "hybrid")]
    application.alembic("downgrade", "-2")
    modes = database.execute(
        "SELECT search_mode, keyword FROM embedline.version JOIN embedline.pipeline USING (pipeline_id)"
    )
    assert modes.fetchall() == [("vector", None)]


def test_a_mode_in_a_history_is_set_before_there_are_rows(
    application: Application, database: psycopg.Connection
) -> None:
    database.execute("TRUNCATE article")
    _work(application.dsn)
    _by_hand(
        application,
        "op.alter_pipeline('article', keyword='english'); op.use_mode('article', version=1, mode='keyword', canaries='none')",
        "op.use_mode('article', version=1, mode='vector')",
    )
    application.alembic("upgrade", "head")
    stored = database.execute("SELECT search_mode, search_mode_reason FROM embedline.version").fetchall()
    assert stored == [("keyword", "set by a migration before there were rows")]


def test_an_inconclusive_gate_stops_the_upgrade_and_stays_as_evidence(
    application: Application, database: psycopg.Connection
) -> None:
    application.run("embedline", "upgrade-model", "article", "--model", "static-256", "--column-type", "halfvec")
    *_, index, cutover, _ = application.revisions()
    application.alembic("upgrade", "+1")
    _work(application.dsn)
    refused = application.alembic("upgrade", _revision_id(cutover), fails=True)
    assert "Its last evaluation is inconclusive" in refused
    assert _at(application) == _revision_id(index)
    assert scalar(database, "SELECT verdict FROM embedline.evaluation") == "inconclusive"
    assert _versions(database) == {1: "serves", 2: "complete"}


def test_a_chain_renders_as_a_script_that_runs(
    application: Application, chain: list[Path], database: psycopg.Connection
) -> None:
    def script(first: Path, last: Path) -> str:
        return application.alembic("upgrade", f"{_revision_id(first)}:{_revision_id(last)}", "--sql").partition(
            "BEGIN;"
        )[2]

    watched = application.revisions()[1]
    with psycopg.connect(application.dsn, autocommit=True) as client:
        client.execute("BEGIN;" + script(watched, chain[0]))
        with pytest.raises(psycopg.errors.RaiseException, match="has no valid index yet") as refused:
            client.execute("BEGIN;" + script(chain[0], chain[1]))
        assert refused.value.diag.message_hint is not None
        assert "embedline build-index article --version 2" in refused.value.diag.message_hint
        client.execute("ROLLBACK")
    assert _at(application) == _revision_id(chain[0])
    assert _versions(database) == {1: "serves", 2: "backfilling"}
    assert "embedline.cutover(" in script(chain[1], chain[2])
    assert "was dropped" in application.alembic(
        "downgrade", f"{_revision_id(chain[3])}:{_revision_id(chain[2])}", "--sql", fails=True
    )


def test_a_script_of_a_whole_chain_goes_on_where_the_index_has_stopped_it(
    application: Application, chain: list[Path], database: psycopg.Connection
) -> None:
    watched = application.revisions()[1]
    rendered = application.alembic("upgrade", f"{_revision_id(watched)}:{_revision_id(chain[2])}", "--sql")
    script = "BEGIN;" + rendered.partition("BEGIN;")[2]
    with psycopg.connect(application.dsn, autocommit=True) as client:
        with pytest.raises(psycopg.errors.RaiseException, match="has no valid index yet"):
            client.execute(script.encode())
        assert _versions(database) == {1: "serves", 2: "backfilling"}
        assert _at(application) == _revision_id(chain[0])
        _work(application.dsn)
        database.execute(scalar(database, "SELECT embedline.index_statement('article', 2)"))
        client.execute(script[script.index("DO $embedline$\nBEGIN\n    IF embedline.index_statement(") :].encode())
    assert _versions(database) == {1: "complete", 2: "serves"}
    assert _at(application) == _revision_id(chain[2])


def test_a_role_that_does_not_own_the_index_has_it_built_and_goes_down_past_it(
    application: Application, chain: list[Path], database: psycopg.Connection, make_role: MakeRole
) -> None:
    role = make_role("embedline_admin")
    for command in ("ALTER TABLE article OWNER TO {}", "ALTER TABLE alembic_version OWNER TO {}"):
        database.execute(sql.SQL(command).format(sql.Identifier(role)))
    application.act_as(role)
    application.alembic("upgrade", "+1")
    _work(application.dsn)
    assert "embedline build-index article --version 2 as a superuser" in application.alembic(
        "upgrade", "+1", fails=True
    )
    database.execute(scalar(database, "SELECT embedline.index_statement('article', 2)"))
    application.alembic("upgrade", "+1")
    application.alembic("downgrade", "-1")
    assert _index_is_valid(database)
    application.alembic("downgrade", "-1")
    assert _versions(database) == {1: "serves"}
    assert not _index_is_valid(database)
    database.execute(sql.SQL("REASSIGN OWNED BY {} TO CURRENT_USER").format(sql.Identifier(role)))


def test_in_a_transaction_of_env_py_the_index_says_so_and_the_cutover_holds_its_locks(
    application: Application, chain: list[Path], database: psycopg.Connection
) -> None:
    application.alembic("upgrade", "+1")
    _work(application.dsn)
    begun = "    with connectable.connect() as connection, connection.begin():"
    application.rewrite(
        application.folder / "migrations" / "env.py", "    with connectable.connect() as connection:", begun
    )
    assert "env.py has begun a transaction" in application.alembic("upgrade", "+1", fails=True)
    statement = scalar(database, "SELECT embedline.index_statement('article', 2)")
    database.execute(statement)
    application.alembic("stamp", _revision_id(chain[1]))
    application.alembic("upgrade", "+1")
    assert _versions(database) == {1: "complete", 2: "serves"}
    application.alembic("downgrade", "-1")
    assert _versions(database) == {1: "serves", 2: "complete"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "--model", "minilm"), 'there is no pipeline "nothing"'),
        (("article", "--model", "other"), "[models.other]"),
        (("article", "--model", "static-256"), "version 1 of pipeline"),
        (("article", "--model", "minilm", "--config", "nowhere.ini"), "there is no nowhere.ini"),
    ],
)
def test_upgrade_model_refuses_what_cannot_be(
    application: Application, arguments: tuple[str, ...], message: str
) -> None:
    before = application.revisions()
    assert message in application.run("embedline", "upgrade-model", *arguments, fails=True)
    assert application.revisions() == before


def test_a_declared_model_is_registered_by_the_chain(application: Application, database: psycopg.Connection) -> None:
    path = scalar(database, "SELECT model FROM embedline.model WHERE name = 'static-256'")
    application.declare(
        PIPELINE
        + f'[models.again]\nprovider = "sentence-transformers"\nmodel = "{path}"\ndocument_prefix = "passage: "\n'
    )
    output = application.run("embedline", "upgrade-model", "article", "--model", "again", "--no-contract")
    assert "[pipelines.article]" in output
    expand, *_, cutover = application.revisions()[-3:]
    assert "op.create_model(" in expand.read_text(encoding="utf-8")
    assert "cutover" in cutover.name
    application.alembic("upgrade", "+1")
    assert scalar(database, "SELECT document_prefix FROM embedline.model WHERE name = 'again'") == "passage: "
    application.alembic("downgrade", "-1")
    assert scalar(database, "SELECT count(*) FROM embedline.model WHERE name = 'again'") == 0
