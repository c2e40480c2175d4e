"""The command line: `embedline upgrade`, `upgrade-model`, `status`, `build-index`, `worker`, `verify`, `doctor` and others."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, LiteralString, NoReturn

import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import embedline
from embedline import evaluate_command, index_build
from embedline.errors import EmbedlineError, ProviderError
from embedline.evaluate_command import VerdictCommand
from embedline.live_display import shown
from embedline.migration_display import Direction, MigrationDisplay, quiet_alembic
from embedline.worker_display import WorkerDisplay, troubles

app = typer.Typer(
    help="Vector embeddings in PostgreSQL, kept true to their source rows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Dsn = Annotated[
    str,
    typer.Option(
        envvar="EMBEDLINE_DSN",
        help="Connection URI, for example postgresql://postgres@localhost/mydb.",
        show_default=False,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print Alembic's own messages, too.")]
Connection = psycopg.Connection[tuple[Any, ...]]
Verdict = Literal["ok", "note", "warning", "error"]

# pgvector before 0.8.2 overflows a buffer in parallel HNSW builds with a maintenance_work_mem of 3 to 4 MB (CVE-2026-3172);
# embedline.preflight says why, and that builds of ours never get so little.
_SAFE_PARALLEL_BUILD = (0, 8, 2)
_SAFE_BUILD_KILOBYTES = 4096
_PGVECTOR_BUGS = (
    ((0, 8, 2), "parallel HNSW builds overflow a buffer with maintenance_work_mem of 3 to 4 MB (CVE-2026-3172)"),
    ((0, 8, 3), "VACUUM may corrupt an HNSW index"),
    ((0, 8, 4), "an HNSW graph damaged by deletes is not repaired"),
)
_COLOURS: dict[Verdict, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}


@app.command()
def upgrade(
    dsn: Dsn, revision: Annotated[str, typer.Argument(help="Alembic revision.")] = "head", verbose: Verbose = False
) -> None:
    """Install Embedline into a database, or bring it to the package's version."""
    _migrate(dsn, "upgrade", revision, verbose)


@app.command()
def downgrade(
    dsn: Dsn,
    revision: Annotated[str, typer.Argument(help="Alembic revision; base removes everything.")],
    verbose: Verbose = False,
) -> None:
    """Go back to an earlier revision; `base` removes every trace except your own tables."""
    _migrate(dsn, "downgrade", revision, verbose)


@app.command()
def status(dsn: Dsn) -> None:
    """Show each pipeline: what waits, how far the backfill is, the last error."""
    with _connect(dsn) as connection:
        cursor = connection.execute(
            "SELECT pipeline, source, model, state, pending, CASE WHEN backfill_complete THEN 'complete'"
            " ELSE trim_scale(backfill_percent) || ' % of ' || backfill_total || ' blocks' END AS backfill,"
            " date_trunc('second', oldest_pending_age) AS oldest,"
            " dead_letters, index_state AS index, workers_alive AS workers, last_error"
            " FROM embedline.status ORDER BY pipeline"
        )
        table = Table(*(column.name.replace("_", " ") for column in cursor.description or ()))
        for row in cursor:
            table.add_row(*("" if value is None else str(value) for value in row[:-1]), row[-1] or "")
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    else:
        console.print("There is no pipeline yet: SELECT embedline.create_pipeline(name, source, content, model);")


@app.command("build-index")
def build_index_command(
    dsn: Dsn,
    pipeline: Annotated[str, typer.Argument(help="Name of the pipeline.")],
    version: Annotated[int | None, typer.Option(help="Number of the version; the serving one without it.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Name of a precision index instead of the column's own.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Parallel workers; max_parallel_maintenance_workers without it, 0: none.")
    ] = None,
) -> None:
    """Build an HNSW index of a pipeline CONCURRENTLY and show how far it is; refuses while vectors are missing."""
    console = Console(highlight=False)
    with (
        _connect(dsn) as connection,
        Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console
        ) as progress,
    ):
        task = progress.add_task("starting", total=100)

        def show(phase: str, percent: float) -> None:
            progress.update(task, description=phase, completed=percent)

        try:
            statement = index_build.build(
                index_build.PsycopgClient(connection),
                pipeline,
                version,
                precision,
                parallel_workers=workers,
                report=show,
                tell=lambda notice: console.print(f"NOTICE: {notice}", markup=False),
            )
        except EmbedlineError as error:
            _fail(_lines(error.message, error.detail, error.hint))
        progress.update(task, description="done", completed=100)
    if statement is None:
        console.print(f"The index of pipeline {pipeline} is valid, or it has none: nothing to build.")


@app.command("evaluate", cls=VerdictCommand)
def evaluate(
    dsn: Dsn,
    pipeline: Annotated[str, typer.Argument(help="Name of the pipeline.")],
    version: Annotated[int, typer.Option(help="Number of the version to measure.")],
    canaries: Annotated[
        str | None, typer.Option(help="Table of labelled queries; without it queries are made from the corpus.")
    ] = None,
    k: Annotated[int, typer.Option(help="Documents that count of each ranking.")] = 10,
    margin: Annotated[float, typer.Option(help="Loss of nDCG that passes.")] = 0.01,
    query_count: Annotated[int, typer.Option(help="Queries to make from the corpus at most.")] = 500,
    breakdown: Annotated[str | None, typer.Option(help="Column of the source; each group has a row.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    min_recall: Annotated[float, typer.Option(help="Recall that the index must have.")] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows and verdict as JSON.")] = False,
) -> None:
    """Measure a version against the one that serves; exit code 0: pass, 1: fail, 2: inconclusive, 3: not measured."""
    request = evaluate_command.Request(
        pipeline, version, canaries, k, margin, query_count, breakdown, seed, min_recall
    )  # fmt: skip
    try:
        with _connect(dsn) as connection:
            rows = evaluate_command.measure(connection, request, Console(stderr=True, highlight=False))
    except typer.Exit as end:
        raise typer.Exit(evaluate_command.EXIT_NOT_MEASURED if end.exit_code == 1 else end.exit_code) from None
    (evaluate_command.print_json if as_json else evaluate_command.print_table)(rows, request)
    raise typer.Exit(evaluate_command.EXIT_CODES[evaluate_command.verdict_of(rows)])


@app.command("upgrade-model")
def upgrade_model(
    pipeline: Annotated[str, typer.Argument(help="Name of the pipeline.")],
    model: Annotated[str, typer.Option(help="Registered model, or one that embedline.toml declares.")],
    config: Annotated[Path, typer.Option(help="alembic.ini of the environment to write to.")] = Path("alembic.ini"),
    column_type: Annotated[Literal["vector", "halfvec"] | None, typer.Option(help="As it is, unless given.")] = None,
    distance: Annotated[Literal["cosine", "inner_product", "l2"] | None, typer.Option(help="The same.")] = None,
    chunking: Annotated[str | None, typer.Option(help="The same.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="The same.")] = None,
    chunk_overlap: Annotated[int | None, typer.Option(help="The same.")] = None,
    canaries: Annotated[str | None, typer.Option(help="Table of labelled queries for the gate.")] = None,
    backfill_order: Annotated[Literal["oldest_first", "newest_first"] | None, typer.Option()] = None,
    backfill_rate: Annotated[int | None, typer.Option(help="Chunks a second at most.")] = None,
    wait_seconds: Annotated[float | None, typer.Option(help="How long the index waits for the backfill.")] = None,
    rollback_window: Annotated[str | None, typer.Option(help="An interval; 48 hours unless given.")] = None,
    head: Annotated[str, typer.Option(help="Revision that the chain follows.")] = "head",
    contract: Annotated[bool, typer.Option(help="Write the last revision now, too.")] = True,
    verbose: Verbose = False,
) -> None:
    """Write the revisions of a model upgrade (expand, index, cutover, contract) into an Alembic environment."""
    recipe = _given(model=model, column_type=column_type, distance=distance, chunking=chunking)
    recipe |= _given(chunk_tokens=chunk_tokens, chunk_overlap=chunk_overlap)
    settings = _given(canaries=canaries, backfill_order=backfill_order, backfill_rate=backfill_rate)
    settings |= _given(wait_seconds=wait_seconds, rollback_window=rollback_window)
    with quiet_alembic(verbose):
        _write_upgrade(config, pipeline, recipe, settings, head, contract)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _write_upgrade(
    config: Path, pipeline: str, recipe: dict[str, Any], settings: dict[str, Any], head: str, contract: bool
) -> None:
    from alembic.util import CommandError

    from embedline.migrations import chain, upgrade_model
    from embedline.migrations.declaration import find_declaration

    try:
        environment = upgrade_model.configuration(config)
        plan = upgrade_model.plan_upgrade(environment, pipeline, recipe, settings)
        phases = chain.PHASES if contract else chain.PHASES[:-1]
        paths = chain.write_chain(environment, plan, head=head, phases=phases)
        declaration = find_declaration(environment)
    except CommandError as error:
        _fail(str(error))
    for phase, path in zip(phases, paths, strict=True):
        typer.echo(f"{phase}: {path}")
    if declaration is not None and pipeline in declaration.pipelines:
        typer.echo(
            f"Say the same in [pipelines.{pipeline}] of {declaration.path}, or autogenerate proposes the way back."
        )


@app.command()
def worker(
    dsn: Dsn,
    pipeline: Annotated[str | None, typer.Option(help="Only this pipeline.")] = None,
    max_seconds: Annotated[float, typer.Option(help="End after so many seconds.")] = 1200.0,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when nothing waits any more.")] = False,
) -> None:
    """Run a worker in a session of the database: CALL embedline.run_worker(). Stop it with Ctrl-C.

    With --until-idle it shows how far it is, and ends with exit code 1 if something could not be embedded.
    """
    display, console = WorkerDisplay(pipeline), Console(stderr=True, highlight=False)
    with _connect(dsn) as connection:
        client = index_build.PsycopgClient(connection)
        with shown(client, display.look, console, lines=until_idle) as tell:

            def hear(notice: psycopg.errors.Diagnostic) -> None:
                if not display.hear(notice.message_primary or ""):
                    tell(notice.message_primary or "")

            connection.add_notice_handler(hear)
            call = (
                "CALL embedline.run_worker(max_seconds => %s::float8, pipeline_name => %s::text,"
                " until_idle => %s::boolean)"
            )
            connection.execute(call, (max_seconds, pipeline, until_idle))
        if until_idle:
            tasks = display.tasks(client.execute)
            typer.echo(display.summary(tasks))
            found = troubles(client.execute, tasks)
            for trouble in found:
                typer.echo(f"error: {trouble}", err=True)
            if found:
                raise typer.Exit(1)


@app.command()
def verify(
    dsn: Dsn,
    pipeline: Annotated[str, typer.Argument(help="Name of the pipeline.")],
    repair: Annotated[bool, typer.Option("--repair", help="Put right what can be.")] = False,
    sample: Annotated[int, typer.Option(help="Chunks that the model is asked for again; 0: none.")] = 20,
) -> None:
    """Compare a pipeline with its source; exit 1 where something is amiss and not repaired."""
    table = Table("finding", "count", "repaired", "example")
    amiss = False
    with _connect(dsn) as connection:
        query = "SELECT finding, count, repaired, example::text FROM embedline.verify(%s, %s, %s)"
        for finding, count, repaired, example in connection.execute(query, (pipeline, repair, sample)):
            table.add_row(finding, "not checked" if count is None else str(count), str(repaired), example)
            amiss |= finding != "pending" and (count is None or repaired < count)
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    else:
        console.print(f"Pipeline {pipeline} is what its source asks for.")
    if amiss:
        raise typer.Exit(1)


@app.command("export-onnx")
def export_onnx(
    model: Annotated[str, typer.Argument(help="Directory of a sentence-transformers model, or its name on the hub.")],
    target: Annotated[Path, typer.Argument(help="Directory to make; the server must be able to read it.")],
    precision: Annotated[Literal["float32", "int8"], typer.Option(help="int8 is for processors.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Commit or tag on the hub.")] = None,
) -> None:
    """Prepare a local model for onnxruntime ahead of time; a model host would otherwise do it at its first start."""
    from embedline.model_host import onnx_export

    try:
        manifest = onnx_export.export(model, str(target), precision, revision)
    except ProviderError as error:
        _fail(_lines(error.message, error.detail, error.hint))
    options = f'{{"backend": "onnx", "precision": "{precision}"}}'
    typer.echo(f"{target}: {manifest.dimensions} dimensions, {precision}. Register it as a superuser:")
    typer.echo(
        f"SELECT embedline.create_model(NAME, 'sentence-transformers', '{target.resolve()}', options => '{options}');"
    )


@app.command()
def doctor(dsn: Dsn) -> None:
    """Check the server for what Embedline needs and for known troubles; exit 1 where something is broken."""
    with _connect(dsn) as connection:
        findings = list(_examine(connection))
    table = Table("check", "found", "verdict", "advice")
    for finding in findings:
        colour = _COLOURS[finding.verdict]
        table.add_row(finding.check, finding.found, f"[{colour}]{finding.verdict}[/{colour}]", finding.advice)
    Console(highlight=False).print(table)
    if any(finding.verdict == "error" for finding in findings):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Finding:
    """One line of `embedline doctor`."""

    check: str
    found: str
    verdict: Verdict
    advice: str = ""


def _examine(connection: Connection) -> Iterator[Finding]:
    yield _postgresql(connection)
    yield _plpython(connection)
    yield from _pgvector(connection)
    yield _schema(connection)
    server_side = _server_side(connection)
    yield server_side.get(
        "package", Finding("Python package", "not checked", "note", "Connect as a superuser to check it.")
    )
    yield _pg_cron(connection)
    yield _workers(connection)
    yield _memory(connection, server_side.get("shm"))


def _postgresql(connection: Connection) -> Finding:
    number = connection.info.server_version
    found = f"{number // 10000}.{number % 10000}"
    if number < 150000:
        return Finding("PostgreSQL", found, "error", "Embedline needs PostgreSQL 15 to 18.")
    if number >= 190000:
        return Finding("PostgreSQL", found, "warning", "Embedline is tested with PostgreSQL 15 to 18.")
    return Finding("PostgreSQL", found, "ok")


def _plpython(connection: Connection) -> Finding:
    if _scalar(connection, "SELECT 1 FROM pg_available_extensions WHERE name = 'plpython3u'") is None:
        major = connection.info.server_version // 10000
        return Finding("plpython3u", "missing", "error", f"On Debian: apt-get install postgresql-plpython3-{major}.")
    installed = _scalar(connection, "SELECT extversion FROM pg_extension WHERE extname = 'plpython3u'")
    if installed is None:
        return Finding("plpython3u", "available", "note", "embedline upgrade installs it into this database.")
    return Finding("plpython3u", str(installed), "ok")


def _pgvector(connection: Connection) -> Iterator[Finding]:
    installed = _scalar(connection, "SELECT extversion FROM pg_extension WHERE extname = 'vector'")
    offered = _scalar(connection, "SELECT default_version FROM pg_available_extensions WHERE name = 'vector'")
    version = installed or offered
    if version is None:
        major = connection.info.server_version // 10000
        yield Finding(
            "pgvector",
            "missing",
            "error",
            f"Debian 13, PGDG: apt-get install postgresql-{major}-pgvector; else build it.",
        )
        return
    if _version(str(version)) < (0, 8, 0):
        yield Finding(
            "pgvector", str(version), "error", "Embedline needs 0.8.0 or newer: iterative scans came with it."
        )
        return
    bugs = [
        f"before {'.'.join(map(str, fixed))}: {bug}" for fixed, bug in _PGVECTOR_BUGS if _version(str(version)) < fixed
    ]
    if not bugs:
        yield Finding("pgvector", str(version), "ok")
    for bug in bugs:
        yield Finding("pgvector", str(version), "warning", f"Known bug, {bug}. Upgrade pgvector.")
    if installed and offered and _version(str(installed)) < _version(str(offered)):
        yield Finding(
            "pgvector", f"{installed} here, {offered} on the server", "note", "ALTER EXTENSION vector UPDATE;"
        )
    kilobytes = int(str(_scalar(connection, "SELECT setting FROM pg_settings WHERE name = 'maintenance_work_mem'")))
    if _version(str(version)) < _SAFE_PARALLEL_BUILD and kilobytes < _SAFE_BUILD_KILOBYTES:
        yield Finding(
            "parallel builds",
            f"maintenance_work_mem {kilobytes} kB",
            "warning",
            "ALTER SYSTEM SET maintenance_work_mem = '64MB'; with less than 4 MB a parallel build overflows until 0.8.2.",
        )


def _schema(connection: Connection) -> Finding:
    if _scalar(connection, "SELECT to_regclass('embedline.setting') IS NOT NULL") is not True:
        return Finding("schema embedline", "missing", "note", "Run: embedline upgrade")
    version = str(_scalar(connection, "SELECT value FROM embedline.setting WHERE name = 'version'"))
    if version != embedline.__version__:
        return Finding(
            "schema embedline", version, "error", f"This package is {embedline.__version__}. Run: embedline upgrade"
        )
    return Finding("schema embedline", version, "ok")


_PROBE = """
DO LANGUAGE plpython3u $python$
import os, sys
try:
    import embedline
    plpy.notice(f'embedline package {embedline.__version__} in {os.path.dirname(embedline.__file__)}')
except ImportError as error:
    path = os.pathsep.join(folder for folder in sys.path if folder)
    plpy.notice(f'embedline missing {error}; Python {sys.version.split()[0]} looks in {path}')
try:
    disk = os.statvfs('/dev/shm')
    plpy.notice(f'embedline shm {disk.f_frsize * disk.f_bavail}')
except OSError:
    pass
$python$
"""


def _server_side(connection: Connection) -> dict[str, Finding]:
    """Look at the server's interpreter and memory file system from inside a backend; empty where that is not allowed."""
    notices: list[str] = []

    def keep(notice: psycopg.errors.Diagnostic) -> None:
        notices.append(notice.message_primary or "")

    connection.add_notice_handler(keep)
    try:
        connection.execute("SET client_min_messages = notice")
        connection.execute(_PROBE)
    except psycopg.Error:
        return {}
    finally:
        connection.remove_notice_handler(keep)
    findings = {}
    for notice in notices:
        word, _, rest = notice.removeprefix("embedline ").partition(" ")
        if word == "package":
            same = rest.split(" ")[0] == embedline.__version__
            advice = "" if same else f"The client's package is {embedline.__version__}."
            findings["package"] = Finding("Python package", rest, "ok" if same else "error", advice)
        elif word == "missing":
            advice = "Install it for that interpreter, or start the server with PYTHONPATH naming its site-packages."
            findings["package"] = Finding("Python package", rest, "error", advice)
        elif word == "shm":
            findings["shm"] = Finding("shared memory", rest, "ok")
    return findings


def _pg_cron(connection: Connection) -> Finding:
    version = _scalar(connection, "SELECT extversion FROM pg_extension WHERE extname = 'pg_cron'")
    if version is None:
        home = _scalar(connection, "SELECT current_setting('cron.database_name', true)")
        advice = "Without it let any scheduler CALL embedline.run_worker(), and run: embedline build-index PIPELINE"
        if home:
            advice = f'It lives in database "{home}": there use cron.schedule_in_database (docs/operations.md).'
        return Finding("pg_cron", "not in this database", "note", advice)
    mode = _scalar(connection, "SELECT current_setting('cron.use_background_workers', true)")
    found = f"{version}, {'background workers' if mode == 'on' else 'libpq mode'}"
    if mode == "on" and _version(str(version)) < (1, 5):
        return Finding(
            "pg_cron", found, "error", "A resident job blocks its launcher: cron.use_background_workers = off, or 1.5."
        )
    return Finding("pg_cron", found, "ok")


def _workers(connection: Connection) -> Finding:
    if _scalar(connection, "SELECT to_regclass('embedline.worker') IS NOT NULL") is not True:
        return Finding("workers", "none", "note")
    alive = _scalar(connection, "SELECT embedline._workers_alive()")
    if not alive:
        return Finding(
            "workers", "none alive", "note", "SELECT embedline.schedule_workers(1); or run: embedline worker"
        )
    return Finding("workers", f"{alive} alive", "ok")


def _memory(connection: Connection, shm: Finding | None) -> Finding:
    kilobytes = int(str(_scalar(connection, "SELECT setting FROM pg_settings WHERE name = 'maintenance_work_mem'")))
    megabytes = kilobytes // 1024
    found = f"maintenance_work_mem {megabytes} MB"
    if shm is not None:
        free = int(shm.found) // 1024**2
        found += f", /dev/shm {free:,} MB free"
        if free < megabytes:
            advice = "A parallel HNSW build needs it: docker --shm-size, or max_parallel_maintenance_workers = 0."
            return Finding("memory", found, "warning", advice)
    if megabytes < 256:
        return Finding(
            "memory", found, "note", "An HNSW graph larger than maintenance_work_mem builds many times slower."
        )
    return Finding("memory", found, "ok")


def _migrate(dsn: str, direction: Direction, revision: str, verbose: bool) -> None:
    from alembic import command
    from alembic.util import CommandError

    with _connect(dsn) as connection:  # a wrong address is told in one line, not in SQLAlchemy's many
        display = MigrationDisplay(direction, connection.info.dbname)
    config = _alembic_config(dsn)
    config.attributes["on_version_apply"] = display.applied
    if direction == "downgrade":
        # What the installation would lack is no news to somebody who takes it away.
        logging.getLogger("embedline").addFilter(lambda record: "pg_cron is not in" not in record.getMessage())
    try:
        with quiet_alembic(verbose):
            getattr(command, direction)(config, revision)
        typer.echo(display.summary(revision))
    except SystemExit:
        display.failed()
        raise
    except CommandError as error:
        display.failed()
        _fail(str(error))
    except Exception as error:
        original = getattr(error, "orig", None)
        display.failed()
        if not isinstance(original, psycopg.Error):
            raise
        _fail(_message(original))


def _alembic_config(dsn: str) -> Any:
    from alembic.config import Config

    packaged = Path(str(resources.files("embedline"))) / "_alembic"
    if packaged.is_dir():
        config = Config(str(packaged / "alembic.ini"))
        config.set_main_option("script_location", str(packaged).replace("%", "%%"))
    else:
        config = Config(str(Path(__file__).resolve().parents[2] / "alembic.ini"))
    config.set_main_option("sqlalchemy.url", dsn.replace("%", "%%"))
    return config


@contextlib.contextmanager
def _connect(dsn: str) -> Iterator[Connection]:
    """Connect in autocommit mode; a database error ends the command with its message, detail and hint."""
    try:
        with psycopg.connect(dsn, autocommit=True, application_name="embedline") as connection:
            yield connection
    except psycopg.Error as error:
        is_missing = isinstance(error, psycopg.errors.InvalidSchemaName | psycopg.errors.UndefinedTable)
        # Not a table of the user's, such as canaries that are not there.
        if is_missing and "embedline" in (error.diag.message_primary or ""):
            _fail("Embedline is not installed in this database\nHINT: embedline upgrade")
        _fail(_message(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _message(error: psycopg.Error) -> str:
    primary = error.diag.message_primary or str(error).strip()
    return _lines(primary, error.diag.message_detail, error.diag.message_hint)


def _lines(message: str, detail: str | None, hint: str | None) -> str:
    lines = [message]
    lines += [f"DETAIL: {detail}"] if detail else []
    lines += [f"HINT: {hint}"] if hint else []
    return "\n".join(lines)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def _scalar(connection: Connection, query: LiteralString, *parameters: object) -> object:
    row = connection.execute(query, parameters or None).fetchone()
    return None if row is None else row[0]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("-")[0]))


def main() -> None:
    """Entry point for `python -m embedline.cli`."""
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    app()


if __name__ == "__main__":
    main()
