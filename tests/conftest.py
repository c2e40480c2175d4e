"""Databases for the tests: one template with Embedline installed, a clone of it for each test, and servers of their own.

`make test` sets EMBEDLINE_DSN; tests that need no server run without it. All others run on a server that is made for them
(see throwaway), never on the one of that address.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import psycopg
import pytest
from psycopg import conninfo, sql
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor

sys.path.insert(0, str(Path(__file__).parent))  # for `import support`

import collecting
import fault_table
import support
import throwaway
from embedline.dev.cluster.bootstrap import local_cluster
from embedline.dev.cluster.server import Cluster
from embedline.dev.cluster.settings import load_settings
from recycling import RecycledDatabase

# Unique to this run, so that two runs on one server never meet.
_RUN = f"{os.getpid()}_{secrets.token_hex(3)}"

# Files that take longest, or wait longest, by what they took: the order in which processes take them.
_LONGEST = {
    name: place
    for place, name in enumerate(
        (
            *(
                "test_torture.py",
                "test_schedule.py",
                "test_job_troubles.py",
                "test_index_jobs.py",
                "test_provider_faults.py",
            ),
            *("test_evaluate.py", "test_capture.py", "test_chunkers_properties.py", "test_operations.py"),
            *(
                "test_starvation.py",
                "test_reach.py",
                "test_search_plans.py",
                "test_onnx_models.py",
                "test_hub_models.py",
            ),
            *("test_versions.py", "test_pipelines.py", "test_documentation.py", "test_upgrades.py", "test_removal.py"),
            *("test_media_models.py", "test_fills.py", "test_verify.py", "test_gate.py", "test_precision.py"),
            *("test_deletions.py", "test_long_commands.py", "test_workers.py", "test_model_host.py", "test_demo.py"),
            *("test_words_of_keys_and_locks.py", "test_budgets_end_to_end.py", "test_estimate.py"),
        )
    )
}


def pytest_configure(config: pytest.Config) -> None:
    """Start the run's server before the processes of a parallel run begin: they inherit its address."""
    if hasattr(config, "workerinput") and not sys.dont_write_bytecode:
        process = config.workerinput
        collecting.rewrite_share(config, int(process["workerid"].removeprefix("gw")), process["workercount"])
    if not os.environ.get("EMBEDLINE_DSN"):
        return
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        cluster = throwaway.start_server()
        config.add_cleanup(lambda: throwaway.remove_server(cluster))
        os.environ["EMBEDLINE_DSN"] = cluster.dsn()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files out that have no test for this run; its processes need not import them."""
    is_file = collection_path.suffix == ".py"
    return True if is_file and collecting.is_left_out(collection_path, config.option.markexpr) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of faults, put the longest files first, and skip what needs torch where it is not installed."""
    for item in items:
        if item.path.parent.name in collecting.FAULT_FOLDERS:
            item.add_marker(pytest.mark.faults)
    # A process takes a file at a time: one that begins late and takes long would run alone at the end.
    items.sort(key=lambda item: _LONGEST.get(item.path.name, len(_LONGEST)))
    _skip_without_torch(items)


def _skip_without_torch(items: list[pytest.Item]) -> None:
    """Skip the tests that need torch where it is not installed; EMBEDLINE_TORCH=1 lets them fail there."""
    if os.environ.get("EMBEDLINE_TORCH") == "1" or importlib.util.find_spec("sentence_transformers") is not None:
        return
    skip = pytest.mark.skip(reason="needs torch: make test TORCH=1 installs it")
    for item in items:
        if item.get_closest_marker("torch") is not None:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hand over what tests of faults have counted."""
    report = yield
    fault_table.hand_over(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of the faults."""
    if found := fault_table.lines(terminalreporter.getreports("passed")):
        terminalreporter.section("faults: what was counted after each")
        for line in found:
            terminalreporter.line(line)


class Connect(Protocol):
    """Opens one more connection to the test's database."""

    def __call__(
        self, role: str | None = None, *, autocommit: bool = True, options: str = ""
    ) -> psycopg.Connection: ...


class MakeRole(Protocol):
    """Creates a role that can log in; it is gone after the test."""

    def __call__(self, *memberships: str) -> str: ...


@pytest.fixture(scope="session")
def server_dsn() -> str:
    """URI of the server that the tests run on."""
    dsn = os.environ.get("EMBEDLINE_DSN")
    if not dsn:
        pytest.fail("EMBEDLINE_DSN is not set: run make test", pytrace=False)
    return dsn


@pytest.fixture(scope="session")
def template_server(server_dsn: str) -> NoopExecutor:
    """The server with the template database on it, which the first of the run's processes to need it makes."""
    server = conninfo.conninfo_to_dict(server_dsn)
    executor = NoopExecutor(
        host=str(server["host"]),
        port=str(server["port"]),
        user=str(server["user"]),
        password=str(server["password"]),
        dbname="embedline_test",
        options="",
        maintenance_dbname="postgres",
    )
    template = sql.Identifier(executor.template_dbname)
    with psycopg.connect(conninfo.make_conninfo(server_dsn, dbname="postgres"), autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(1)")
        exists = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = %s AND datistemplate)"
        if not support.scalar(connection, exists, (executor.template_dbname,)):
            connection.execute(sql.SQL("CREATE DATABASE {}").format(template))
            # What `make up` does to its database.
            name = executor.template_dbname
            support.install(support.uri(executor.host, executor.port, executor.user, executor.password, name))
            connection.execute(sql.SQL("ALTER DATABASE {} IS_TEMPLATE true").format(template))
    return executor


def _drop_database(dsn: str, name: str) -> None:
    """Drop a database with whatever is still connected to it."""
    identifier = sql.Identifier(name)
    with psycopg.connect(conninfo.make_conninfo(dsn, dbname="postgres"), autocommit=True) as connection:
        exists = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = %s)"
        if support.scalar(connection, exists, (name,)):
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifier))


@pytest.fixture
def maintenance(server_dsn: str) -> Iterator[psycopg.Connection]:
    """A superuser's connection to the server's database postgres."""
    with psycopg.connect(conninfo.make_conninfo(server_dsn, dbname="postgres"), autocommit=True) as connection:
        yield connection


@pytest.fixture
def role_passwords(maintenance: psycopg.Connection) -> Iterator[dict[str, str]]:
    """Roles of this test with their passwords; dropped once the test's databases are."""
    passwords: dict[str, str] = {}
    yield passwords
    for role in reversed(passwords):
        maintenance.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))


@pytest.fixture(scope="session")
def recycled_database(template_server: NoopExecutor) -> Iterator[RecycledDatabase]:
    """The database that this process's tests have one after the other."""
    recycled = RecycledDatabase(lambda: cloned_database(template_server, template_server.template_dbname))
    yield recycled
    recycled.close()
    if report := os.environ.get("EMBEDLINE_RECYCLING"):
        with open(report, "a", encoding="utf-8") as file:
            file.write(f"{recycled.clones} clones; differences: {dict(collections.Counter(recycled.differences))}\n")


@pytest.fixture
def database_dsn(recycled_database: RecycledDatabase, role_passwords: dict[str, str]) -> Iterator[str]:
    """URI of a database that is as the template is, for a superuser."""
    with recycled_database.lend(role_passwords.keys()) as dsn:
        yield dsn


@pytest.fixture
def empty_database_dsn(server_dsn: str, template_server: NoopExecutor, role_passwords: dict[str, str]) -> Iterator[str]:
    """URI of a database without Embedline in it. The template stays beside it, so that the server's roles stay too."""
    with cloned_database(template_server, "template0") as dsn:
        yield dsn


def dbname_of(dsn: str) -> str:
    """Return the name of a URI's database."""
    return str(conninfo.conninfo_to_dict(dsn)["dbname"])


@contextlib.contextmanager
def cloned_database(server: NoopExecutor, template: str) -> Iterator[str]:
    """Clone a database for as long as the block lasts; the URI is for a superuser."""
    name = f"embedline_test_{_RUN}_{secrets.token_hex(4)}"
    janitor = DatabaseJanitor(
        user=server.user,
        host=server.host,
        port=server.port,
        dbname=name,
        template_dbname=template,
        maintenance_dbname=server.maintenance_dbname,
        password=server.password,
    )
    janitor.init()
    try:
        yield support.uri(server.host, server.port, server.user, server.password, name)
    finally:
        _drop_database(os.environ["EMBEDLINE_DSN"], name)


@pytest.fixture
def connect(database_dsn: str, role_passwords: dict[str, str]) -> Iterator[Connect]:
    """Open further connections to the test's database; a role logs in as itself, so it cannot become a superuser."""
    opened: list[psycopg.Connection] = []

    def _connect(role: str | None = None, *, autocommit: bool = True, options: str = "") -> psycopg.Connection:
        login: Mapping[str, str] = {} if role is None else {"user": role, "password": role_passwords[role]}
        dsn = conninfo.make_conninfo(database_dsn, options=options, **login)
        connection = psycopg.connect(dsn, autocommit=autocommit)
        opened.append(connection)
        return connection

    yield _connect
    for connection in opened:
        connection.close()


@pytest.fixture
def database(connect: Connect, recycled_database: RecycledDatabase, database_dsn: str) -> psycopg.Connection:
    """A superuser's autocommit connection to the test's own database, models static-256 and minilm registered.

    The session may have imports of earlier tests, and nothing else of them; those of `connect` are new.
    """
    return recycled_database.session(database_dsn) or connect()


@pytest.fixture
def make_role(maintenance: psycopg.Connection, role_passwords: dict[str, str]) -> MakeRole:
    """Create roles that can log in; arguments are the roles of which it is a member."""

    def _make(*memberships: str) -> str:
        name, password = f"embedline_test_{secrets.token_hex(4)}", secrets.token_hex(8)
        maintenance.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), password))
        role_passwords[name] = password
        for group in memberships:
            maintenance.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(name)))
        return name

    return _make


StartCluster = Callable[..., Cluster]


@pytest.fixture(scope="session")
def new_cluster() -> Iterator[StartCluster]:
    """Make clusters in temporary folders that go at the end of the session, also after kill -9 of the server."""
    settings = load_settings()
    with contextlib.ExitStack() as stack:

        def _new(
            *,
            cron_database: str | None = None,
            settings_: Mapping[str, str] | None = None,
            environment: Mapping[str, str] | None = None,
        ) -> Cluster:
            # Not pytest's tmp_path, which is closed to the server's OS user.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="embedline-", ignore_cleanup_errors=True))
            Path(folder).chmod(0o755)
            cluster = Cluster(
                data_dir=Path(folder) / "data",
                port=support.free_port(),
                bin_dir=local_cluster(settings).bin_dir,
                python_path=throwaway.server_python_path(),
                cron_database=cron_database,
                settings={"shared_buffers": "64MB", "max_wal_size": "1GB", "fsync": "off", **(settings_ or {})},
                environment=environment or {},
            )
            stack.callback(cluster.remove)
            atexit.register(cluster.remove)
            stack.callback(atexit.unregister, cluster.remove)
            return cluster

        yield _new


@pytest.fixture(scope="session")
def installed_clusters() -> dict[str | None, Cluster]:
    """Stopped servers with Embedline installed, by the database of pg_cron: others begin as copies of them."""
    return {}


@pytest.fixture(scope="module")
def start_cluster(new_cluster: StartCluster, installed_clusters: dict[str | None, Cluster]) -> Iterator[StartCluster]:
    """Start throw-away servers with Embedline installed and static-256 registered: start_cluster(cron_database=None, ...).

    Each has a data directory and a free port of its own, and ends with the module.
    """
    with contextlib.ExitStack() as stack:

        def _start(*, cron_database: str | None = None, **options: Mapping[str, str] | None) -> Cluster:
            if cron_database not in installed_clusters:
                installed_clusters[cron_database] = _with_embedline(new_cluster(cron_database=cron_database))
            cluster = new_cluster(cron_database=cron_database, **options)
            subprocess.run(["cp", "-a", installed_clusters[cron_database].data_dir, cluster.data_dir], check=True)
            stack.callback(cluster.remove)
            cluster.start()
            return cluster

        yield _start


def _with_embedline(cluster: Cluster) -> Cluster:
    """Install Embedline on a new server, and stop it."""
    cluster.init()
    cluster.start()
    if cluster.cron_database is not None:
        with psycopg.connect(cluster.dsn(cluster.cron_database), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS pg_cron")
    support.install(cluster.dsn(), models=("static-256",))
    cluster.stop()
    return cluster


@pytest.fixture(scope="module")
def own_cluster(start_cluster: StartCluster) -> Cluster:
    """A server of the test module's own, without pg_cron."""
    return start_cluster()


@pytest.fixture(scope="module")
def cron_cluster(start_cluster: StartCluster) -> Cluster:
    """A server of the test module's own with pg_cron in database embedline; no worker is scheduled yet."""
    return start_cluster(cron_database="embedline")


@pytest.fixture(scope="module")
def module_database(template_server: NoopExecutor) -> Iterator[psycopg.Connection]:
    """Like `database`, but one clone for all tests of a module that only read what its first fixture wrote."""
    with (
        cloned_database(template_server, template_server.template_dbname) as dsn,
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        yield connection
