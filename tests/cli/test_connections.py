"""Every way to name a database, and a pool in front of it, with the real command line and the real alembic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

import programs
from embedline.client import connection
from embedline.client.connection import NoDatabaseNamed
from pooler import pooled
from support import ROOT, create_pages, create_pipeline, free_port, scalar, settle

_COMMAND = ["embedline"]
_ALEMBIC = ["alembic", "upgrade", "head"]


def _run(command: list[str], check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {n: v for n, v in os.environ.items() if not n.startswith("PG") and n != "EMBEDLINE_DSN"}
    if command[0] == sys.executable:
        done = subprocess.run(
            command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, check=False, timeout=300
        )
    else:
        done = programs.run(*command, cwd=ROOT, env={**clean, **environment})
    assert not check or done.returncode == 0, done.stderr
    return done


def _libpq(dsn: str) -> dict[str, str]:
    parts = conninfo.conninfo_to_dict(dsn)
    return {
        "PGHOST": str(parts["host"]), "PGPORT": str(parts["port"]), "PGUSER": str(parts["user"]),
        "PGPASSWORD": str(parts["password"]), "PGDATABASE": str(parts["dbname"]),
    }  # fmt: skip


def test_each_form_reaches_the_database(database: psycopg.Connection, database_dsn: str, tmp_path: Path) -> None:
    create_pages(database, 3)
    create_pipeline(database)
    settle(database)
    libpq = _libpq(database_dsn)
    key_value = conninfo.make_conninfo("", **conninfo.conninfo_to_dict(database_dsn))
    assert "://" not in key_value
    services = tmp_path / "pg_service.conf"
    services.write_text(
        "[mine]\n"
        + "".join(f"{name[2:].lower().replace('database', 'dbname')}={value}\n" for name, value in libpq.items())
    )
    sqlalchemy_form = database_dsn.replace("postgresql://", "postgresql+psycopg://")
    for dsn in (database_dsn, key_value, sqlalchemy_form):
        assert "page" in _run([*_COMMAND, "status", "--dsn", dsn]).stdout
        _run(_ALEMBIC, EMBEDLINE_DSN=dsn)
    _run([*_COMMAND, "upgrade"], EMBEDLINE_DSN=key_value)
    service = {"PGSERVICEFILE": str(services)}
    assert "page" in _run([*_COMMAND, "status", "--dsn", "service=mine"], **service).stdout
    _run(_ALEMBIC, EMBEDLINE_DSN="service=mine", **service)
    for environment in ({"PGSERVICE": "mine", **service}, libpq):
        assert "page" in _run([*_COMMAND, "status"], **environment).stdout
        assert "was up to date" in _run([*_COMMAND, "upgrade"], **environment).stdout
        _run(_ALEMBIC, **environment)


def test_a_percent_in_the_address_is_no_format(database_dsn: str) -> None:
    parts = conninfo.conninfo_to_dict(database_dsn)
    dsn = f"postgresql://{parts['user']}@/{parts['dbname']}?host=127%2E0%2E0%2E1&port={parts['port']}"
    _run([*_COMMAND, "upgrade", "--dsn", dsn], PGPASSWORD=str(parts["password"]))


@pytest.mark.parametrize(
    "command",
    [
        [*_COMMAND, "status"],
        [*_COMMAND, "upgrade"],
        _ALEMBIC,
        [sys.executable, "-m", "embedline.client.cli", "status"],
        [sys.executable, "-m", *_ALEMBIC],
        [sys.executable, str(Path(sys.executable).with_name("embedline")), "upgrade"],
        [sys.executable, str(Path(sys.executable).with_name("alembic")), "upgrade", "head"],
    ],
)
def test_without_a_database_named_it_says_what_to_set(command: list[str]) -> None:
    done = _run(command, check=False)
    assert done.returncode == 1
    assert "EMBEDLINE_DSN=postgresql:///mydb" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_server_is_told_in_a_few_lines() -> None:
    for command in ([*_COMMAND, "doctor"], _ALEMBIC):
        done = _run(command, check=False, EMBEDLINE_DSN=f"host=127.0.0.1 port={free_port()} dbname=x user=y")
        assert done.returncode == 1
        assert "Connection refused" in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 4


def test_an_empty_connection_string_needs_a_variable_of_libpq(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("EMBEDLINE_DSN", raising=False)
    with pytest.raises(NoDatabaseNamed):
        connection.resolve("")
    monkeypatch.setenv("PGDATABASE", "mydb")
    assert connection.resolve(None) == ""


@pytest.fixture
def pool(database: psycopg.Connection, database_dsn: str) -> Iterator[str]:
    """URI of a PgBouncer in transaction mode in front of the test's database."""
    with pooled(database_dsn) as dsn:
        yield dsn


def test_every_command_works_through_a_pool(database: psycopg.Connection, pool: str) -> None:
    create_pages(database, 20)
    create_pipeline(database)
    _run([*_COMMAND, "upgrade", "--dsn", pool])
    _run(_ALEMBIC, EMBEDLINE_DSN=pool)
    _run([*_COMMAND, "worker", "--until-idle", "--dsn", pool])
    assert "page" in _run([*_COMMAND, "status", "--dsn", pool]).stdout
    refused = _run([*_COMMAND, "worker", "--dsn", pool], check=False)
    assert refused.returncode == 1
    assert "Connect a worker to the server itself" in refused.stderr
    _run([*_COMMAND, "status", "--json", "--dsn", pool])
    _run([*_COMMAND, "verify", "page", "--dsn", pool])
    assert "PostgreSQL" in _run([*_COMMAND, "doctor", "--dsn", pool]).stdout
    refused = _run([*_COMMAND, "build-index", "page", "--dsn", pool], check=False)
    assert refused.returncode == 1
    assert "pool" in refused.stderr
    assert "SELECT embedline.build_vector_index('page');" in refused.stderr
    with psycopg.connect(pool, autocommit=True, prepare_threshold=None) as behind:
        # Whatever session of the pool comes now, nothing of ours is left in it.
        for _ in range(5):
            assert scalar(behind, "SELECT count(*) FROM pg_prepared_statements WHERE from_sql") == 0
            changed = "SELECT array_agg(name) FROM pg_settings WHERE source = 'session' AND setting <> reset_val"
            assert set(scalar(behind, changed) or []) <= {"application_name", "client_encoding"}
    locks = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    assert scalar(database, locks) == 0
    assert scalar(database, "SELECT pending = 0 FROM embedline.status") is True
    _run([*_COMMAND, "downgrade", "base", "--dsn", pool])
    assert scalar(database, "SELECT to_regnamespace('embedline') IS NULL") is True
