"""What `embedline upgrade`, `downgrade` and `upgrade-model` print: what a person needs, and Alembic's own messages by -v."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from application import Application
from command_line import run
from support import ROOT, create_pages, create_pipeline, scalar, settle


def _revisions() -> list[tuple[str, str]]:
    """Return number and first line of each revision from the first to the head."""
    scripts = ScriptDirectory.from_config(Config(str(ROOT / "alembic.ini"))).walk_revisions()
    return [(s.revision, (s.longdoc or "").splitlines()[0].rstrip(".")) for s in reversed(list(scripts))]


def test_upgrade_and_downgrade_print_a_line_for_each_revision_and_a_summary(empty_database_dsn: str) -> None:
    name = psycopg.conninfo.conninfo_to_dict(empty_database_dsn)["dbname"]
    revisions = _revisions()
    up = run(empty_database_dsn, "upgrade")
    assert up.returncode == 0, up.stderr
    *lines, summary = up.stdout.splitlines()
    assert lines == [f"  {revision}  {title}" for revision, title in revisions]
    assert summary.endswith(f'database "{name}" is up to date after {len(revisions)} revisions')
    assert [line.partition(":")[0] for line in up.stderr.splitlines()] == ["NOTICE"], "only that pg_cron is missing"
    again = run(empty_database_dsn, "upgrade")
    (summary,) = again.stdout.splitlines()
    assert "was up to date" in summary
    down = run(empty_database_dsn, "downgrade", "base")
    assert down.returncode == 0, down.stderr
    *lines, summary = down.stdout.splitlines()
    assert lines == [f"  {revision}  undone: {title}" for revision, title in reversed(revisions)]
    assert summary == f'Embedline is removed from database "{name}"; your tables stay'
    assert "pg_cron" not in down.stderr
    assert "could not look for changes" not in down.stderr
    # The template's database uses the roles, too.
    assert "NOTICE: role embedline_admin stays: another database" in down.stderr
    for message in (up.stderr, again.stderr, down.stderr):
        assert "alembic" not in message


def test_verbose_prints_alembics_own_messages(empty_database_dsn: str) -> None:
    up = run(empty_database_dsn, "upgrade", "-v")
    assert up.returncode == 0, up.stderr
    assert up.stderr.count("[alembic.runtime.migration] Running upgrade") == len(_revisions())


def test_a_downgrade_that_fails_says_that_nothing_has_changed(database: psycopg.Connection, database_dsn: str) -> None:
    create_pages(database, 3)
    create_pipeline(database, index_method="none")
    settle(database)
    database.execute("SELECT embedline.add_embedding_version('page', 'static-256', column_type => 'halfvec')")
    # An earlier release knows no second version; base asks for none to be known.
    down = run(database_dsn, "downgrade", "0005")
    assert down.returncode == 1
    assert "rolled back: the database is as it was" in down.stdout
    assert "HINT:" in down.stderr
    assert scalar(database, "SELECT version_num FROM embedline.alembic_version") == _revisions()[-1][0]


@pytest.fixture
def application(tmp_path: Path, database_dsn: str, database: psycopg.Connection) -> Application:
    """An application with a pipeline over its table."""
    app = Application(tmp_path, database_dsn)
    app.autogenerate("article")
    app.alembic("upgrade", "head")
    database.execute("INSERT INTO article SELECT n, 'Title ' || n, 'Body ' || n FROM generate_series(1, 20) AS n")
    create_pipeline(database, "article", "article", "title", index_method="none")
    settle(database)
    return app


def _said(application: Application, program: str, *arguments: str) -> tuple[str, str]:
    process = application.start(program, *arguments)
    output, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    return output, messages


def test_upgrade_model_prints_the_files_that_it_wrote(application: Application, database: psycopg.Connection) -> None:
    output, messages = _said(application, "embedline", "upgrade-model", "article", "--model", "minilm")
    assert messages == ""
    assert [line.partition(":")[0] for line in output.splitlines()] == ["expand", "index", "cutover", "contract"]
    database.execute(
        "SELECT embedline.create_model('again', provider, model) FROM embedline.model WHERE name = 'minilm'"
    )
    _, messages = _said(application, "embedline", "upgrade-model", "article", "--model", "again", "-v")
    assert "INFO" in messages


def test_the_applications_own_logging_stays_as_it_is(application: Application, database: psycopg.Connection) -> None:
    _said(application, "embedline", "upgrade-model", "article", "--model", "static-256", "--column-type", "halfvec")
    _, messages = _said(application, "alembic", "upgrade", "+1")
    assert "INFO  [alembic.runtime.migration] Running upgrade" in messages
    settle(database)
    # 20 queries decide nothing, so the cutover is refused; what the gate found is logged before.
    messages = application.start("alembic", "upgrade", "head").communicate(timeout=120)[1]
    gate = [line for line in messages.splitlines() if "[alembic.embedline] gate of" in line]
    figures = r"nDCG@10: \w+; old \d\.\d{3}, new \d\.\d{3}, difference -?\d\.\d{3}, 95 % interval"
    assert any(re.search(figures, line) for line in gate), messages
    assert not any("None" in line for line in gate)
