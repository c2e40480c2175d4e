"""`embedline doctor`: what the server lacks or suffers from, as a list of checks that anyone can add one to.

A check takes a Server and yields findings: nothing, where it has nothing to look at. What is put under `commands` is run as
it stands, so it is never broken into lines.
"""

from __future__ import annotations

import functools
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, LiteralString

import psycopg
from psycopg import sql

import embedline
from embedline.client.connection import Connection, server_message
from embedline.client.install import ENCODING_REMEDY, MINIMUM_PGVECTOR, REQUIRED_MODULES

# In the order in which a person should see to them.
Verdict = Literal["error", "warning", "note", "ok"]
_WEIGHTS: tuple[Verdict, ...] = ("error", "warning", "note", "ok")

_PGVECTOR_BUGS = (
    (
        (0, 8, 2),
        "parallel HNSW builds by hand overflow a buffer with maintenance_work_mem of 3 to 4 MB (CVE-2026-3172)",
    ),
    ((0, 8, 3), "VACUUM may corrupt an HNSW index"),
    ((0, 8, 4), "an HNSW graph damaged by deletes is not repaired"),
)
# Bytes of shared memory that the smallest parallel index build asks for at once; with less it is built serially.
_SMALLEST_PARALLEL_BUILD = 72 * 1024**2


@dataclass(frozen=True)
class Finding:
    """What one check found: a line of `embedline doctor`, with what to do about it."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Server:
    """The database that is looked at."""

    connection: Connection

    def scalar(self, query: LiteralString, *parameters: object) -> Any:
        """Return the first column of the first row, or None."""
        row = self.connection.execute(query, parameters or None).fetchone()
        return None if row is None else row[0]

    @functools.cached_property
    def major(self) -> int:
        return self.connection.info.server_version // 10000

    @functools.cached_property
    def is_superuser(self) -> bool:
        return bool(self.scalar("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"))

    @functools.cached_property
    def database(self) -> str:
        return str(self.scalar("SELECT current_database()"))

    @functools.cached_property
    def is_installed(self) -> bool:
        return bool(self.scalar("SELECT to_regclass('embedline.setting') IS NOT NULL"))

    def offered(self, extension: str) -> str | None:
        """Return the version of an extension that the server could install, or None."""
        found = self.scalar("SELECT default_version FROM pg_available_extensions WHERE name = %s", extension)
        return None if found is None else str(found)

    def installed(self, extension: str) -> str | None:
        """Return the version of an extension in this database, or None."""
        found = self.scalar("SELECT extversion FROM pg_extension WHERE extname = %s", extension)
        return None if found is None else str(found)

    @functools.cached_property
    def inside(self) -> dict[str, Any]:
        """What the server's Python says of itself, the package and /dev/shm; empty where we may not ask it.

        Before `embedline upgrade` plpython3u is not there: it is created for the look, and rolled back.
        """
        if not self.is_superuser or self.offered("plpython3u") is None:
            return {}
        with self.connection.transaction(force_rollback=True):
            self.connection.execute("SET LOCAL client_min_messages = warning")
            self.connection.execute("CREATE EXTENSION IF NOT EXISTS plpython3u")
            self.connection.execute(_PROBE.encode())
            found: dict[str, Any] = json.loads(str(self.scalar("SELECT current_setting('embedline.probe')")))
        return found


_PROBE = f"""
DO LANGUAGE plpython3u $python$
import json, os, sys
found = {{'python': sys.version.split()[0], 'path': [folder for folder in sys.path if folder]}}
try:
    {REQUIRED_MODULES}
    found['version'], found['folder'] = embedline.__version__, os.path.dirname(embedline.__file__)
except ImportError as error:
    found['missing'] = str(error)
try:
    disk = os.statvfs('/dev/shm')
    found['shared_memory'] = disk.f_frsize * disk.f_bavail
except OSError:
    pass
plpy.execute(plpy.prepare("SELECT set_config('embedline.probe', $1, true)", ['text']), [json.dumps(found)])
$python$
"""

_SCHEDULED_WORKERS = """
    SELECT count(*) FROM cron.job
    WHERE database = current_database() AND active AND jobname ~ '^embedline worker [0-9]+$'
"""

Check = Callable[[Server], Iterable[Finding]]


def postgresql(server: Server) -> Iterator[Finding]:
    """The server's version is one that Embedline is made for."""
    number = server.connection.info.server_version
    found = f"{number // 10000}.{number % 10000}"
    if number < 150000:
        yield Finding("PostgreSQL", "error", found, "Embedline needs PostgreSQL 15 to 18.")
    elif number >= 190000:
        yield Finding("PostgreSQL", "warning", found, "Embedline is tested with PostgreSQL 15 to 18.")
    else:
        yield Finding("PostgreSQL", "ok", found)


def encoding(server: Server) -> Iterator[Finding]:
    """The database is in UTF8."""
    found = str(server.scalar("SHOW server_encoding"))
    if found == "UTF8":
        yield Finding("encoding", "ok", found)
        return
    yield Finding(
        "encoding",
        "error",
        found,
        "Embedline needs a database in UTF8, and a database keeps its encoding: make a new one, and move your data there.",
        (ENCODING_REMEDY,),
    )


def role(server: Server) -> Iterator[Finding]:
    """The role may look at everything."""
    if not server.is_superuser:
        name = server.scalar("SELECT current_user")
        advice = "The server's Python, its shared memory and the jobs' runs are not looked at: connect as a superuser."
        yield Finding("role", "note", f"{name} is not a superuser", advice)


def plpython(server: Server) -> Iterator[Finding]:
    """plpython3u is there."""
    if server.offered("plpython3u") is None:
        package = f"apt-get install postgresql-plpython3-{server.major}"
        yield Finding("plpython3u", "error", "missing", "On Debian:", (package,))
    elif (installed := server.installed("plpython3u")) is None:
        yield Finding("plpython3u", "ok", "available; embedline upgrade installs it")
    else:
        yield Finding("plpython3u", "ok", installed)


def pgvector(server: Server) -> Iterator[Finding]:
    """pgvector is there, new enough, and without known bugs."""
    installed, offered = server.installed("vector"), server.offered("vector")
    version = installed or offered
    if version is None:
        advice = "Debian 13 and PostgreSQL's own packages (PGDG) have it; else build 0.8.0 or newer from source."
        package = f"apt-get install postgresql-{server.major}-pgvector"
        yield Finding("pgvector", "error", "missing", advice, (package,))
        return
    update = ("ALTER EXTENSION vector UPDATE;",) if installed and _is_older(installed, offered) else ()
    if _version(version) < MINIMUM_PGVECTOR:
        advice = "Embedline needs 0.8.0 or newer: iterative scans came with it."
        yield Finding("pgvector", "error", version, advice, update)
        return
    found = f"{installed} here, {offered} on the server" if update else version
    bugs = [(fixed, bug) for fixed, bug in _PGVECTOR_BUGS if _version(version) < fixed]
    if bugs:
        newest = ".".join(map(str, bugs[-1][0]))
        advice = (
            f"Known bugs, fixed with {newest}: {'; '.join(bug for _, bug in bugs)}."
            " Your distribution may have mended them in its package; PGDG has a newer one."
        )
        yield Finding("pgvector", "warning", found, advice, update)
    elif update:
        yield Finding("pgvector", "note", found, "The newer one is on the server already.", update)
    else:
        yield Finding("pgvector", "ok", found)


def schema(server: Server) -> Iterator[Finding]:
    """Embedline is installed in this database, in this package's version."""
    if not server.is_installed:
        yield Finding("schema embedline", "note", "not installed in this database", "", ("embedline upgrade",))
        return
    version = str(server.scalar("SELECT value FROM embedline.setting WHERE name = 'version'"))
    if version == embedline.__version__:
        yield Finding("schema embedline", "ok", version)
    else:
        advice = f"This package is {embedline.__version__}."
        yield Finding("schema embedline", "error", version, advice, ("embedline upgrade",))


def package(server: Server) -> Iterator[Finding]:
    """The server's Python finds this very package."""
    inside = server.inside
    if "version" in inside:
        found = f"{inside['version']} in {inside['folder']}"
        if inside["version"] == embedline.__version__:
            yield Finding("Python package", "ok", found)
        else:
            advice = f"The client's package is {embedline.__version__}. Install one version for both, then restart the server."
            yield Finding("Python package", "error", found, advice)
    elif "missing" in inside:
        advice = (
            f"The server's Python {inside['python']} looks in {', '.join(inside['path'])}."
            " Have the server start with PYTHONPATH naming the folder into which the package was installed."
        )
        yield Finding("Python package", "error", inside["missing"], advice, _python_path(server))


def _python_path(server: Server) -> tuple[str, ...]:
    """Return how a cluster of Debian's tools gets PYTHONPATH; nothing for other servers."""
    file = PurePosixPath(str(server.scalar("SHOW config_file")))
    if file.parts[:3] != ("/", "etc", "postgresql"):
        return ()
    line = f"PYTHONPATH = '{sysconfig.get_path('purelib')}'"
    version, cluster = file.parts[3:5]
    return (f'echo "{line}" >> {file.parent}/environment', f"pg_ctlcluster {version} {cluster} restart")


def pg_cron(server: Server) -> Iterator[Finding]:
    """pg_cron is there and runs jobs in a mode in which a resident one stops no other."""
    version = server.installed("pg_cron")
    # A parameter that exists only where the library is loaded.
    mode = server.scalar("SELECT current_setting('cron.use_background_workers', true)")
    if version is None:
        yield _no_pg_cron(server, is_loaded=mode is not None)
        return
    found = f"{version}, {'background workers' if mode == 'on' else 'libpq mode'}"
    if mode == "on" and _version(version) < (1, 5):
        advice = "Before 1.5 a resident job stops all others in this mode. Restart the server after:"
        yield Finding("pg_cron", "error", found, advice, ("ALTER SYSTEM SET cron.use_background_workers = off;",))
    else:
        yield Finding("pg_cron", "ok", found)


def _no_pg_cron(server: Server, *, is_loaded: bool) -> Finding:
    otherwise = "Without it let any scheduler run `embedline worker`, and after a backfill `embedline build-index`."
    if server.offered("pg_cron") is None:
        package_name = f"apt-get install postgresql-{server.major}-cron"
        return Finding("pg_cron", "note", "not on the server", f"Optional. {otherwise}", (package_name,))
    if not is_loaded:
        advice = f"Optional. In postgresql.conf, before a restart and CREATE EXTENSION pg_cron. {otherwise}"
        settings = ("shared_preload_libraries = 'pg_cron'", f"cron.database_name = '{server.database}'")
        return Finding("pg_cron", "note", "not loaded", advice, settings)
    home = str(server.scalar("SELECT current_setting('cron.database_name', true)"))
    if home == server.database:
        advice = "The server runs it for this database."
        return Finding("pg_cron", "warning", "not in this database", advice, ("CREATE EXTENSION pg_cron;",))
    job = sql.SQL("SELECT cron.schedule_in_database('embedline worker 1', '* * * * *', {}, {});").format(
        "CALL embedline.run_worker(slot => 1)", server.database
    )
    return Finding(
        "pg_cron",
        "note",
        f'in database "{home}"',
        "Schedule the workers from there:",
        (job.as_string(server.connection),),
    )


def jobs(server: Server) -> Iterator[Finding]:
    """Each of our scheduled jobs runs."""
    if server.scalar("SELECT to_regprocedure('embedline._job_troubles()') IS NOT NULL") is not True:
        return
    for names, trouble, remedy in server.connection.execute(
        "SELECT jobs, trouble, remedy FROM embedline._job_troubles()"
    ):
        yield Finding("pg_cron jobs", "error", f"{names}: {trouble}", "", tuple(str(remedy).splitlines()))


def workers(server: Server) -> Iterator[Finding]:
    """Somebody embeds what is written."""
    if server.scalar("SELECT to_regclass('embedline.worker') IS NOT NULL") is not True:
        return
    alive = int(server.scalar("SELECT embedline._workers_alive()"))
    if alive:
        yield Finding("workers", "ok", f"{alive} alive")
    elif server.installed("pg_cron") is None:
        yield Finding("workers", "note", "none alive", "", ("embedline worker",))
    elif scheduled := int(server.scalar(_SCHEDULED_WORKERS)):
        advice = "pg_cron starts them at the turn of the minute. Where it does not, the server's log has the reason."
        yield Finding("workers", "warning", f"{scheduled} scheduled, none alive", advice)
    else:
        yield Finding("workers", "note", "none alive", "", ("SELECT embedline.schedule_workers(1);",))


def shared_memory(server: Server) -> Iterator[Finding]:
    """An index can be built by several processes."""
    free = server.inside.get("shared_memory")
    if free is None or server.scalar("SHOW dynamic_shared_memory_type") != "posix":
        return
    found = f"/dev/shm has {free // 1024**2:,} MB free"  # noqa: S108  the kernel's, not a file of ours
    if free < _SMALLEST_PARALLEL_BUILD and int(server.scalar("SHOW max_parallel_maintenance_workers")) > 0:
        advice = "Indexes are built by one process: a parallel build takes 72 MB and more. In containers: --shm-size."
        yield Finding("shared memory", "note", found, advice)
    else:
        yield Finding("shared memory", "ok", found)


# One after the other; of the same weight, findings are shown in this order.
_REACH = """
    SELECT p.name, v.number, r.ef_search, r.recall, coalesce(r.recall_target, 0.99) AS target,
        (SELECT f.finding ->> 'count' FROM embedline.verification AS o
         CROSS JOIN LATERAL jsonb_array_elements(o.findings) AS f (finding)
         WHERE o.pipeline_id = p.pipeline_id AND NOT o.repair AND f.finding ->> 'name' = 'unreachable'
            AND o.verified_at = (SELECT max(n.verified_at) FROM embedline.verification AS n
                                 WHERE n.pipeline_id = p.pipeline_id)) AS unreachable
    FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.version_id = p.serving_version_id
    LEFT JOIN embedline.index_reach AS r ON r.version_id = v.version_id
    WHERE EXISTS (SELECT FROM embedline.versions AS s
                  WHERE s.pipeline = p.name AND s.version = v.number AND s.index_state = 'valid')
    ORDER BY p.name
"""


def index_reach(server: Server) -> Iterator[Finding]:
    """The index of each serving version was measured, and finds what exact ranking finds."""
    if not server.is_installed or server.scalar("SELECT to_regclass('embedline.index_reach')") is None:
        return
    for name, number, ef_search, recall, target, unreachable in server.connection.execute(_REACH).fetchall():
        check, command = f"index of {name}", f"SELECT * FROM embedline.verify({_literal(name)}, repair => true);"
        if unreachable is not None:
            advice = "Search does not reach rows that exact ranking finds. A repair has them ranked exactly."
            yield Finding(check, "warning", f"{unreachable} rows unreachable in a sample", advice, (command,))
        elif ef_search is None:
            advice = "Its recall is not measured yet. An idle worker does that, and each verify."
            yield Finding(check, "note", "not measured", advice, (command,))
        elif recall < target - 0.01:
            advice = (
                f"Searches find less than the {target:g} that is asked for. Build the index again with a better graph."
            )
            index = f'embedline_data."{name}_v{number}_embedding_idx"'
            rebuild = (f"ALTER INDEX {index} SET (ef_construction = 400);", f"REINDEX INDEX CONCURRENTLY {index};")
            yield Finding(check, "warning", f"recall@10 {recall:.3f} with ef_search {ef_search}", advice, rebuild)
        else:
            yield Finding(check, "ok", f"recall@10 {recall:.3f} with ef_search {ef_search}")


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


CHECKS: tuple[Check, ...] = (
    postgresql,
    encoding,
    role,
    plpython,
    pgvector,
    package,
    schema,
    pg_cron,
    jobs,
    workers,
    shared_memory,
    index_reach,
)


def examine(connection: Connection, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """Run the checks on a connection in autocommit mode; return what they found, the gravest first."""
    server = Server(connection)
    found = [finding for check in checks for finding in _run(check, server)]
    return sorted(found, key=lambda finding: _WEIGHTS.index(finding.verdict))


def _run(check: Check, server: Server) -> Iterator[Finding]:
    """Yield a check's findings; one that the database refuses to answer is told as not made, and stops no other."""
    try:
        yield from check(server)
    except psycopg.Error as error:
        yield Finding(check.__name__.replace("_", " "), "note", "not checked", str(server_message(error)))


def as_json(findings: Iterable[Finding]) -> str:
    """Return findings as a JSON array of objects with the fields of Finding."""
    return json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False)


def _is_older(version: str, other: str | None) -> bool:
    return other is not None and _version(version) < _version(other)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("-")[0]))
