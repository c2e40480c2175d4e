"""The command line.

Commands are `embedline upgrade`, `upgrade-model`, `status`, `build-index`, `worker`, `verify`, `doctor` and others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

import embedline
from embedline.client import build_index, cli_metrics, evaluate_command, terminal
from embedline.client.connection import Connection, connect, lines, server_message
from embedline.client.doctor.examine import as_json, examine
from embedline.client.evaluate_command import VerdictCommand
from embedline.client.live_display import shown
from embedline.client.migration_display import Direction, MigrationDisplay, quiet_alembic
from embedline.client.worker_display import WorkerDisplay, troubles
from embedline.errors import EmbedlineError, ProviderError

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
        # If it is empty, libpq's environment (PGSERVICE, PGHOST, PGDATABASE, ...) names the database; else `connect`
        # names the setting.
        default_factory=str,
        help="postgresql:///mydb, or any other connection string of libpq, such as 'service=mydb' or 'host=db1 dbname=mydb'."
        " Without it PGSERVICE, PGHOST, PGDATABASE and the like count.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print Alembic's own messages, too.")]
# The largest number that the functions of the database take.
_INT4 = 2**31 - 1
# PostgreSQL's own limit of max_parallel_maintenance_workers.
_PARALLEL_WORKERS = 1024


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"embedline {embedline.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Vector embeddings in PostgreSQL, kept true to their source rows."""


@app.command()
def upgrade(
    dsn: Dsn, revision: Annotated[str, typer.Argument(help="Alembic revision.")] = "head", verbose: Verbose = False
) -> None:
    """Install Embedline into a database, or bring it to the package's version."""
    _migrate(dsn, "upgrade", revision, verbose)


# Without it click takes the revision -1 for an option.
@app.command(context_settings={"ignore_unknown_options": True})
def downgrade(
    dsn: Dsn,
    revision: Annotated[str, typer.Argument(help="Alembic revision; base removes everything.")],
    verbose: Verbose = False,
) -> None:
    """Return to an earlier revision; `base` removes everything except your own tables."""
    _migrate(dsn, "downgrade", revision, verbose)


app.command("metrics")(cli_metrics.metrics)

_STATUS = """
    SELECT pipeline, source, model, state, pending,
        CASE WHEN backfill_complete THEN 'complete'
            ELSE trim_scale(backfill_percent) || ' % of ' || backfill_total || ' blocks' END AS backfill,
        date_trunc('second', oldest_pending_age) AS oldest, dead_letters AS dead, index_state AS index,
        workers_alive AS workers, last_error
    FROM embedline.status ORDER BY pipeline
"""


@app.command()
def status(dsn: Dsn, json: AsJson = False) -> None:
    """Show each pipeline: waiting changes, progress of the backfill, the last error."""
    with _connect(dsn) as connection:
        if json:
            rows = connection.execute("SELECT to_jsonb(s) FROM embedline.status AS s ORDER BY s.pipeline").fetchall()
            typer.echo(terminal.as_json([row[0] for row in rows]))
            return
        cursor = connection.execute(_STATUS)
        columns, found = [column.name for column in cursor.description or ()], cursor.fetchall()
    if found:
        typer.echo(terminal.table(columns, found, terminal.width()))
    else:
        typer.echo("There is no pipeline yet: SELECT embedline.create_pipeline(name, source, content, model);")


@app.command("build-index")
def build_index_command(
    dsn: Dsn,
    pipeline: Annotated[str, typer.Argument(help="Name of the pipeline.")],
    version: Annotated[
        int | None, typer.Option(min=1, max=_INT4, help="Number of the version; the serving one without it.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Name of a precision index instead of the column's own.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, max=_PARALLEL_WORKERS, help="Parallel workers; max_parallel_maintenance_workers without it, 0: none."
        ),
    ] = None,
) -> None:
    """Build an HNSW index of a pipeline CONCURRENTLY and show its progress.

    It refuses while vectors are missing.
    """
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
            statement = build_index.build(
                build_index.PsycopgClient(connection),
                pipeline,
                version,
                precision,
                parallel_workers=workers,
                report=show,
                tell=lambda notice: console.print(f"NOTICE: {notice}", markup=False),
            )
        except EmbedlineError as error:
            _fail(lines(error.message, error.detail, error.hint))
        progress.update(task, description="done", completed=100)
    if statement is None:
        console.print(f"The index of pipeline {pipeline} is valid, or it has none: nothing to build.")


@app.command("evaluate", cls=VerdictCommand)
def evaluate(
    dsn: Dsn,
    pipeline: Annotated[str, typer.Argument(help="Name of the pipeline.")],
    version: Annotated[int, typer.Option(min=1, max=_INT4, help="Number of the version to measure.")],
    canaries: Annotated[
        str | None, typer.Option(help="Table of labelled queries; without it queries are made from the corpus.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, max=_INT4, help="Documents that count of each ranking.")] = 10,
    margin: Annotated[float, typer.Option(help="Loss of nDCG that passes.")] = 0.01,
    query_count: Annotated[int, typer.Option(min=1, max=_INT4, help="Queries to make from the corpus at most.")] = 500,
    breakdown: Annotated[str | None, typer.Option(help="Column of the source; each group has a row.")] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Of the random draws.")] = 0,
    min_recall: Annotated[float, typer.Option(help="Recall that the index must have.")] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows and verdict as JSON.")] = False,
) -> None:
    """Measure a version against the serving one.

    Exit code 0: pass, 1: fail, 2: inconclusive, 3: not measured.
    """
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
    chunk_tokens: Annotated[int | None, typer.Option(min=1, max=_INT4, help="The same.")] = None,
    chunk_overlap: Annotated[int | None, typer.Option(min=0, max=_INT4, help="The same.")] = None,
    canaries: Annotated[str | None, typer.Option(help="Table of labelled queries for the gate.")] = None,
    backfill_order: Annotated[Literal["oldest_first", "newest_first"] | None, typer.Option()] = None,
    backfill_rate: Annotated[int | None, typer.Option(min=1, max=_INT4, help="Chunks a second at most.")] = None,
    wait_seconds: Annotated[float | None, typer.Option(help="How long the index waits for the backfill.")] = None,
    rollback_window: Annotated[str | None, typer.Option(help="An interval; 48 hours unless given.")] = None,
    head: Annotated[str, typer.Option(help="Revision that the chain follows.")] = "head",
    contract: Annotated[bool, typer.Option(help="Write the last revision now, too.")] = True,
    verbose: Verbose = False,
) -> None:
    """Write the revisions of a model upgrade into an Alembic environment.

    They are expand, index, cutover and contract.
    """
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

    from embedline.client.migrations import chain, upgrade_model
    from embedline.client.migrations.declaration import find_declaration

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
    """Run a worker in a session of the database: CALL embedline.run_worker().

    Stop it with Ctrl-C. With --until-idle it shows its progress, and ends with exit code 1 if something could not be
    embedded.
    """
    display, console = WorkerDisplay(pipeline), Console(stderr=True, highlight=False)
    with _connect(dsn) as connection:
        client = build_index.PsycopgClient(connection)
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
    sample: Annotated[
        int, typer.Option(min=0, max=_INT4, help="Chunks that the model is asked for again; 0: none.")
    ] = 20,
) -> None:
    """Compare a pipeline with its source; exit 1 if a difference is not repaired."""
    found: list[tuple[object, ...]] = []
    amiss = False
    with _connect(dsn) as connection:
        query = "SELECT finding, count, repaired, example::text FROM embedline.verify(%s, %s, %s::integer)"
        for finding, count, repaired, example in connection.execute(query, (pipeline, repair, sample)):
            found.append((finding, "not checked" if count is None else count, repaired, example))
            amiss |= finding != "pending" and (count is None or repaired < count)
    if found:
        typer.echo(terminal.table(("finding", "count", "repaired", "example"), found, terminal.width()))
    else:
        typer.echo(f"Pipeline {pipeline} is what its source asks for.")
    if amiss:
        raise typer.Exit(1)


@app.command("export-onnx")
def export_onnx(
    model: Annotated[str, typer.Argument(help="Directory of a sentence-transformers model, or its name on the hub.")],
    target: Annotated[Path, typer.Argument(help="Directory to make; the server must be able to read it.")],
    precision: Annotated[Literal["float32", "int8"], typer.Option(help="int8 is for processors.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Commit or tag on the hub.")] = None,
) -> None:
    """Prepare a local model for onnxruntime ahead of time.

    A model host would otherwise do it at its first start.
    """
    from embedline.model_host import onnx_export

    try:
        manifest = onnx_export.export(model, str(target), precision, revision)
    except ProviderError as error:
        _fail(lines(error.message, error.detail, error.hint))
    options = f'{{"backend": "onnx", "precision": "{precision}"}}'
    typer.echo(f"{target}: {manifest.dimensions} dimensions, {precision}. Register it as a superuser:")
    typer.echo(
        f"SELECT embedline.create_model(NAME, 'sentence-transformers', '{target.resolve()}', options => '{options}');"
    )


@app.command()
def doctor(dsn: Dsn, json: AsJson = False) -> None:
    """Check the server for Embedline's needs and known troubles; exit 1 on an error."""
    with _connect(dsn) as connection:
        found = examine(connection)
    typer.echo(as_json(found) if json else terminal.findings(found, terminal.width()))
    if any(finding.verdict == "error" for finding in found):
        raise typer.Exit(1)


def _migrate(dsn: str, direction: Direction, revision: str, verbose: bool) -> None:
    from alembic import command
    from alembic.util import CommandError

    with _connect(dsn) as connection:  # reports a wrong address in one line, not in SQLAlchemy's many
        display = MigrationDisplay(direction, connection.info.dbname)
    config = _alembic_config(dsn)
    config.attributes["on_version_apply"] = display.applied
    if direction == "downgrade":
        # Missing parts of the installation do not matter to a person who removes it.
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
        _fail(str(server_message(original)))


def _alembic_config(dsn: str) -> Any:
    from alembic.config import Config

    packaged = Path(str(resources.files("embedline"))) / "_alembic"
    if packaged.is_dir():
        config = Config(str(packaged / "alembic.ini"))
        config.set_main_option("script_location", str(packaged).replace("%", "%%"))
    else:
        config = Config(str(Path(__file__).resolve().parents[3] / "alembic.ini"))
    config.set_main_option("sqlalchemy.url", dsn.replace("%", "%%"))
    return config


@contextlib.contextmanager
def _connect(dsn: str) -> Iterator[Connection]:
    """Connect in autocommit mode.

    A database error ends the command with its message, detail and hint.
    """
    try:
        with connect(dsn) as connection:
            yield connection
    except EmbedlineError as error:
        _fail(lines(error.message, error.detail, error.hint))
    except psycopg.Error as error:
        is_missing = isinstance(error, psycopg.errors.InvalidSchemaName | psycopg.errors.UndefinedTable)
        # Not a table of the user's, such as missing canaries.
        if is_missing and "embedline" in (error.diag.message_primary or ""):
            _fail("Embedline is not installed in this database\nHINT: embedline upgrade")
        _fail(str(server_message(error)))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point for `python -m embedline.client.client.cli`."""
    app()


if __name__ == "__main__":
    main()
