"""Fine-tune the manual's model on half of the terms of its index.

`make demo-finetune` trains static-256 on one half of the terms. The gate measures it by the other half, which it has never
seen. The steps are those of docs/how-to/fine-tune-a-model.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.markup import escape

from embedline.client.training.request import require_libraries
from embedline.core.query_hash import query_hash
from embedline.dev.demo.demos import DEMOS, Demo
from embedline.dev.demo.manual import manual_folder, read_index_terms, read_pages
from embedline.dev.demo.run import DemoFailed, build_index, drain, headline, recreate, scalar
from embedline.dev.demo.steps import gate, index, say, store_terms
from embedline.errors import NotReady

NAME, BASE, TUNED = "manual_finetune", "static-256", "manual-tuned"
_DEMO = Demo(**{**vars(DEMOS[BASE]), "name": NAME})
_ROWS_PER_CALL = 1000
_FILLED_SECONDS = 120.0
_VERSION = "SELECT state, chunks, vectors, last_error FROM embedline.versions WHERE pipeline = %s AND version = %s"
_LINEAGE = """
    SELECT v.version, v.model, v.serving, v.gate, v.trained_from, left(v.pairs_hash, 16), t.seed, t.outcome
    FROM embedline.versions AS v JOIN embedline.model AS m ON m.name = v.model
    LEFT JOIN embedline.training AS t USING (model_id) WHERE v.pipeline = %s ORDER BY v.version
"""


def run_finetune(dsn: str, console: Console) -> list[str]:
    """Run the whole demo; return its broken promises, an empty list if all were kept."""
    started = time.perf_counter()
    try:
        require_libraries()
    except NotReady as error:
        raise DemoFailed(f"{error.message}; run: make demo-finetune TORCH=1") from None
    with psycopg.connect(dsn, autocommit=True, application_name="embedline demo") as connection:
        folder = manual_folder(connection.info.server_version // 10000)
        pages = list(read_pages(folder))
        headline(console, f"{len(pages):,} pages of the PostgreSQL manual, served by model {BASE}")
        _forget_last_run(connection)
        recreate(connection, _DEMO, pages, console)
        shortfalls = drain(connection, _DEMO, pages, console)
        build_index(connection, _DEMO, console)
        known = {page.name for page in pages}
        terms = {term: found & known for term, found in read_index_terms(folder).items() if found & known}
        pairs = {term: found for term, found in terms.items() if int(query_hash(term)[0], 16) % 2}
        canaries = {term: found for term, found in terms.items() if term not in pairs}
        store_terms(connection, f"{NAME}_pair", pairs)
        store_terms(connection, f"{NAME}_canary", canaries)
        console.print(
            f"pairs: [bold]{len(pairs):,}[/bold] index terms with the pages that answer them ({NAME}_pair);"
            f" canaries: the other [bold]{len(canaries):,}[/bold] ({NAME}_canary)"
        )
        _train(dsn, console)
        shortfalls += _upgrade(connection, console)
    seconds = time.perf_counter() - started
    headline(console, f"Done in {seconds:.0f} s. The same with your pairs: docs/how-to/fine-tune-a-model.md")
    return shortfalls


def _forget_last_run(connection: psycopg.Connection[Any]) -> None:
    """Remove pipeline, model and directory of an earlier run."""
    if scalar(connection, "SELECT count(*) FROM embedline.pipeline WHERE name = %s", [NAME]):
        connection.execute("SELECT embedline.drop_pipeline(%s)", (NAME,))
    if scalar(connection, "SELECT count(*) FROM embedline.model WHERE name = %s", [TUNED]):
        connection.execute("SELECT embedline.drop_model(%s)", (TUNED,))
    base = Path(str(scalar(connection, "SELECT model FROM embedline.model WHERE name = %s", [BASE])))
    for name in (TUNED, f"{TUNED}.training"):
        shutil.rmtree(base.parent / name, ignore_errors=True)


def _train(dsn: str, console: Console) -> None:
    headline(console, "Train: half of the terms, a fifth of them held out")
    arguments = ["finetune", NAME, "--base", BASE, "--pairs", f"{NAME}_pair", "--name", TUNED]
    console.print(f"[green]embedline {' '.join(arguments)}[/green]", soft_wrap=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "embedline.client.cli", *arguments, "--dsn", dsn], check=False)
    if done.returncode != 0:
        raise DemoFailed(f"embedline finetune ended with exit code {done.returncode}; 0 is a gain")
    console.print(f"  [bold]{time.perf_counter() - started:.0f} s[/bold], with the measurement before and after")


def _upgrade(connection: psycopg.Connection[Any], console: Console) -> list[str]:
    number = _expand(connection, console)
    index(connection, NAME, number, console)
    _offer_pairs(connection, number, console)
    verdict = gate(connection, NAME, number, console)
    if verdict != "pass":
        return [f"the gate of {TUNED} says {verdict}"]
    headline(console, "Cutover, the lineage of what serves, rollback")
    _run(connection, f"SELECT embedline.cutover('{NAME}', {number})", console)
    console.print("  version, model, serving, gate, trained from, hash of the pairs, seed, outcome:")
    for row in connection.execute(_LINEAGE, (NAME,)).fetchall():
        console.print("  " + "  ".join("-" if value is None else str(value) for value in row), markup=False)
    serving = scalar(connection, "SELECT model FROM embedline.versions WHERE pipeline = %s AND serving", [NAME])
    _run(connection, f"SELECT embedline.rollback('{NAME}')", console)
    back = scalar(connection, "SELECT model FROM embedline.versions WHERE pipeline = %s AND serving", [NAME])
    console.print(f"  served by {serving}, and after the rollback by {back} again")
    return [] if (serving, back) == (TUNED, BASE) else ["cutover and rollback did not change the serving model"]


def _run(connection: psycopg.Connection[Any], statement: str, console: Console) -> None:
    say(console, statement)
    started = time.perf_counter()
    connection.execute(statement.encode())
    console.print(f"  {(time.perf_counter() - started) * 1000:.0f} ms")


def _expand(connection: psycopg.Connection[Any], console: Console) -> int:
    headline(console, f"Expand: a version of {TUNED}, filled by this session")
    statement = f"SELECT embedline.add_embedding_version('{NAME}', '{TUNED}')"
    say(console, statement)
    started = time.perf_counter()
    number = int(scalar(connection, statement))
    while True:
        connection.execute("SELECT public.embed_pending(%s, %s)", (_ROWS_PER_CALL, NAME))
        row = connection.execute(_VERSION, (NAME, number)).fetchone()
        state, chunks, vectors, last_error = row or (None, 0, 0, "the version is gone")
        seconds = time.perf_counter() - started
        if state == "complete":
            console.print(f"  [bold]{vectors:,}[/bold] of {chunks:,} chunks in {seconds:.1f} s")
            return number
        if seconds > _FILLED_SECONDS:
            raise DemoFailed(f"version {number} was not filled in {_FILLED_SECONDS:.0f} s; last error: {last_error}")


def _offer_pairs(connection: psycopg.Connection[Any], number: int, console: Console) -> None:
    """Offer the gate the very pairs of the training, which it refuses."""
    headline(console, "A gate on the pairs that the model was trained on is refused")
    statement = f"SELECT * FROM embedline.evaluate('{NAME}', {number}, canaries => '{NAME}_pair')"
    say(console, statement)
    try:
        connection.execute(statement.encode())
    except psycopg.errors.InvalidParameterValue as error:
        console.print(f"  [red]ERROR:  {escape((error.diag.message_primary or '').removeprefix('embedline: '))}[/red]")
        return
    raise DemoFailed("the gate took the pairs of the training as its canaries")
