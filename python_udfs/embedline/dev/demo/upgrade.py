"""Upgrade the model of pages that are searched and edited all the time.

`make demo-upgrade` goes to the new model, back to the old one, and to the new one for good. The statements are those of
docs/how-to/upgrade-a-model.md; `embedline upgrade-model` writes the same chain as Alembic revisions.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.markup import escape

from embedline.dev.cluster.models import cut_static_model
from embedline.dev.demo.demos import DEMOS, Demo
from embedline.dev.demo.manual import manual_folder, read_index_terms, read_pages
from embedline.dev.demo.run import DemoFailed, await_worker, build_index, drain, headline, recreate, scalar
from embedline.dev.demo.steps import gate, index, say, store_terms
from embedline.dev.demo.traffic import LiveTraffic, Tally

NAME, OLD_MODEL, NEW_MODEL = "manual_upgrade", "minilm", "bge-small"
# The instruction that bge-small's card asks for before a query, and not before a text.
_QUERY_PREFIX = "Represent this sentence for searching relevant passages: "
_REGISTER = """
    SELECT embedline.create_model(%s, 'sentence-transformers', %s, query_prefix => %s, options => '{"precision": "int8"}')
"""
_BAD_DIMENSIONS = 16
_DEMO = Demo(
    **{
        **vars(DEMOS["minilm"]),
        "model": OLD_MODEL,
        "name": NAME,
    }
)
_FILLED_SECONDS = 900.0
_CAUGHT_UP_SECONDS = 60.0
_PAUSE_SECONDS = 3.0
_VERSION = """
    SELECT state, chunks, vectors, missing, queued, last_error FROM embedline.versions WHERE pipeline = %s AND version = %s
"""


def run_upgrade(dsn: str, console: Console) -> list[str]:
    """Run the whole demo; return its broken promises, an empty list if all were kept."""
    started = time.perf_counter()
    with psycopg.connect(dsn, autocommit=True, application_name="embedline demo") as connection:
        folder = manual_folder(connection.info.server_version // 10000)
        pages = [page for page in read_pages(folder) if page.name.startswith(_DEMO.page_prefix)]
        headline(console, f"{len(pages):,} pages of the PostgreSQL manual, served by model {_DEMO.model}")
        _forget_last_run(connection)
        _register_new(connection)
        recreate(connection, _DEMO, pages, console)
        shortfalls = drain(connection, _DEMO, pages, console)
        build_index(connection, _DEMO, console)
        known = {page.name for page in pages}
        terms = {term: found & known for term, found in read_index_terms(folder).items() if found & known}
        store_terms(connection, f"{NAME}_canary", terms)
        console.print(
            f"canaries: [bold]{len(terms):,}[/bold] index terms with the pages that answer them ({NAME}_canary)"
        )
        await_worker(connection, console)
        with LiveTraffic(dsn, NAME, sorted(known), list(terms)) as traffic:
            shortfalls += _upgrade(connection, traffic.tally, console)
            shortfalls += _offer_bad_model(connection, console)
        shortfalls += _report(traffic.tally, console)
    headline(
        console,
        f"Done in {time.perf_counter() - started:.0f} s. The same in your own migrations: docs/how-to/use-alembic.md",
    )
    return shortfalls


def _forget_last_run(connection: psycopg.Connection[Any]) -> None:
    """Remove the objects that an interrupted run left.

    They are the pipeline, and the bad model that it could not forget.
    """
    if scalar(connection, "SELECT count(*) FROM embedline.pipeline WHERE name = %s", [NAME]):
        connection.execute("SELECT embedline.drop_pipeline(%s)", (NAME,))
    if scalar(connection, "SELECT count(*) FROM embedline.model WHERE name = %s", [_bad_name()]):
        connection.execute("SELECT embedline.drop_model(%s)", (_bad_name(),))


def _register_new(connection: psycopg.Connection[Any]) -> None:
    """Register the new model, whose files the set-up put beside the old one's.

    One of an earlier run is registered again, because the checkout may have moved.
    """
    old = Path(str(scalar(connection, "SELECT model FROM embedline.model WHERE name = %s", [OLD_MODEL])))
    with contextlib.suppress(psycopg.errors.UndefinedObject):
        connection.execute("SELECT embedline.drop_model(%s)", (NEW_MODEL,))
    connection.execute(_REGISTER, (NEW_MODEL, str(old.parent / NEW_MODEL), _QUERY_PREFIX))


def _bad_name() -> str:
    return f"static-{_BAD_DIMENSIONS}"


def _upgrade(connection: psycopg.Connection[Any], tally: Tally, console: Console) -> list[str]:
    shortfalls: list[str] = []
    number = _expand(connection, NEW_MODEL, console)
    index(connection, NAME, number, console)
    verdict = gate(connection, NAME, number, console)
    if verdict != "pass":
        shortfalls.append(f"the gate of {NEW_MODEL} says {verdict}")
        return shortfalls
    headline(console, "Cutover, rollback, cutover: each is one statement")
    pauses = [_swap(connection, f"SELECT embedline.cutover('{NAME}', {number})", tally, console)]
    time.sleep(_PAUSE_SECONDS)
    pauses.append(_swap(connection, f"SELECT embedline.rollback('{NAME}')", tally, console))
    missing = _missing_after_rollback(connection, console)
    if missing:
        shortfalls.append(f"{missing} chunks were missing after the rollback")
    time.sleep(_PAUSE_SECONDS)
    pauses.append(_swap(connection, f"SELECT embedline.cutover('{NAME}', {number})", tally, console))
    console.print(f"longest reader pause in a cutover or rollback: [bold]{max(pauses) * 1000:.0f} ms[/bold]")
    _contract(connection, console)
    return shortfalls


def _expand(connection: psycopg.Connection[Any], model: str, console: Console) -> int:
    headline(console, f"Expand: a version of {model}, written with every change from here on, filled by the worker")
    statement = f"SELECT embedline.add_embedding_version('{NAME}', '{model}')"
    say(console, statement)
    started = time.perf_counter()
    number = int(scalar(connection, statement))
    console.print(f"  returned after {(time.perf_counter() - started) * 1000:.0f} ms")
    started = time.perf_counter()
    limit = time.monotonic() + _FILLED_SECONDS
    with console.status(f"filling version {number}") as status:
        while True:
            state, chunks, vectors, _, _, last_error = (
                connection.execute(_VERSION, (NAME, number)).fetchone() or (None,) * 6
            )
            status.update(f"filling version {number}: {vectors:,} of {chunks:,} chunks")
            if state == "complete":
                break
            if time.monotonic() > limit:
                raise DemoFailed(
                    f"version {number} was not filled in {_FILLED_SECONDS:.0f} s; last error: {last_error}"
                )
            time.sleep(0.2)
    seconds = time.perf_counter() - started
    console.print(
        f"  [bold]{vectors:,}[/bold] chunks in {seconds:.0f} s beside readers and a writer, counted: complete"
    )
    return number


def _swap(connection: psycopg.Connection[Any], statement: str, tally: Tally, console: Console) -> float:
    """Run a swap; return the longest time in seconds of a read during it."""
    begin = time.monotonic()
    connection.execute(statement.encode())
    end = time.monotonic()
    # A read that began in the swap may still be running.
    time.sleep(0.5)
    pause = tally.longest_between(begin, end)
    say(console, statement)
    console.print(f"  {(end - begin) * 1000:.0f} ms; the longest read meanwhile {pause * 1000:.0f} ms")
    return pause


def _missing_after_rollback(connection: psycopg.Connection[Any], console: Console) -> int:
    """Count the vectors that the restored version lacks.

    They are counted at once, and until the writes of the last moments are embedded.
    """
    started = time.monotonic()
    first: int | None = None
    while True:
        row = connection.execute(_VERSION, (NAME, 1)).fetchone()
        if row is None:
            raise DemoFailed("version 1 is gone")
        _, chunks, vectors, missing, _, _ = row
        first = missing if first is None else first
        seconds = time.monotonic() - started
        if not missing or seconds > _CAUGHT_UP_SECONDS:
            break
        time.sleep(0.02)
    console.print(
        f"  coverage after the rollback: {first} chunks missing at once, [bold]{vectors:,} of {chunks:,}[/bold] there after"
        f" {seconds * 1000:.0f} ms, with all that was written since the cutover"
    )
    return int(missing)


def _contract(connection: psycopg.Connection[Any], console: Console) -> None:
    headline(console, "Contract: the old version goes; usually after 48 hours, here at once")
    statement = f"SELECT embedline.drop_embedding_version('{NAME}', 1, rollback_window => '0')"
    size = scalar(connection, "SELECT pg_total_relation_size(to_regclass(%s))", [f"embedline_data.{NAME}_v1"])
    connection.execute(statement.encode())
    say(console, statement)
    console.print(f"  {size / 1e6:.1f} MB of vectors and their index are free")


def _offer_bad_model(connection: psycopg.Connection[Any], console: Console) -> list[str]:
    """Offer static-256's vectors cut to 16 dimensions.

    Returns a fault if they are not refused.
    """
    headline(console, f"A bad model, static-256's vectors cut to {_BAD_DIMENSIONS} dimensions, is offered and refused")
    _register_bad(connection)
    number = _expand(connection, _bad_name(), console)
    index(connection, NAME, number, console)
    verdict = gate(connection, NAME, number, console)
    statement = f"SELECT embedline.cutover('{NAME}', {number})"
    refusal = None
    try:
        connection.execute(statement.encode())
    except psycopg.errors.ObjectNotInPrerequisiteState as error:
        refusal = error.diag.message_primary
    say(console, statement)
    console.print(f"  [red]ERROR:  {escape(refusal or 'none')}[/red]")
    connection.execute("SELECT embedline.drop_embedding_version(%s, %s)", (NAME, number))
    connection.execute("SELECT embedline.drop_model(%s)", (_bad_name(),))
    return [] if refusal and verdict == "fail" else [f"the bad model was not refused: its gate says {verdict}"]


def _register_bad(connection: psycopg.Connection[Any]) -> None:
    # The contract may have forgotten the old model. Its files are beside the new one's.
    new = Path(str(scalar(connection, "SELECT model FROM embedline.model WHERE name = %s", [NEW_MODEL])))
    folder = new.parent / _bad_name()
    cut_static_model(new.parent / "static-256", _BAD_DIMENSIONS, folder)
    connection.execute("SELECT embedline.create_model(%s, 'sentence-transformers', %s)", (_bad_name(), str(folder)))


def _report(tally: Tally, console: Console) -> list[str]:
    headline(console, f"What {len(tally.reads):,} reads and {tally.writes:,} writes saw meanwhile")
    console.print(f"failed reads: [bold]{len(tally.failures)}[/bold]")
    console.print(f"reads that mixed models: [bold]{tally.mixed}[/bold]")
    console.print(f"longest read of all: {tally.longest * 1000:.0f} ms (two cores embed, build, evaluate and serve)")
    found = [f"{len(tally.failures)} reads failed: {tally.failures[0]}"] if tally.failures else []
    return found + ([f"{tally.mixed} reads mixed models"] if tally.mixed else [])
