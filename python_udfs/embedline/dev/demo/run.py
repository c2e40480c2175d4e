"""Run the demo: load, embed, index, search, measure recall, edit, delete.

Every statement is its own transaction (autocommit), so no snapshot is held while it waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import psycopg
from psycopg import sql
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from embedline.client.build_index import PsycopgClient, build
from embedline.core.retrieval_metrics import recall_at_k
from embedline.dev.demo.demos import Demo
from embedline.dev.demo.manual import Page, manual_folder, read_index_terms, read_pages

_CONTENT = r"title || E'\n\n' || body"
_TABLE_COMMENT = "Embedline demo: pages of the PostgreSQL manual"
_ROWS_PER_CALL = 100
_K = 10
# Seconds without progress after which the demo fails. A worker commits a whole provider request at once; on two busy
# cores a large one of MiniLM takes minutes.
_STALLED_SECONDS = 600.0
_WORKER_SECONDS = 90.0
_VISIBLE_SECONDS = 30.0
_LOCK_TRIES = 5
_EDIT_WORD = "glimmerwrap"
_EDIT_TEXT = (
    "The glimmerwrap gardener waters the office plants: ferns, cactuses and orchids. "
    "Its watering can is filled every second Tuesday, and the orchids are never watered at noon."
)
_EDIT_QUESTION = "watering the office plants, ferns, cactuses and orchids"
_STATUS = "SELECT pending, backfill_complete, dead_letters, last_error, workers_alive FROM embedline.status WHERE pipeline = %s"
_SEARCH = "SELECT key, chunk, score FROM embedline.search(%s, %s, %s, per_document => true)"
_SEARCH_BY = "SELECT key, chunk, score FROM embedline.search(%s, %s, %s, per_document => true, mode => %s)"
_MODES = ("vector", "keyword", "hybrid")
_HAS_WORKER = "SELECT embedline._workers_alive() > 0"


class DemoFailed(Exception):
    """The demo cannot go on."""


def run_demo(dsn: str, demo: Demo, console: Console) -> list[str]:
    """Run the whole demo; return its broken promises, an empty list if all were kept."""
    started = time.perf_counter()
    with psycopg.connect(dsn, autocommit=True, application_name="embedline demo") as connection:
        folder = manual_folder(connection.info.server_version // 10000)
        pages = [page for page in read_pages(folder) if page.name.startswith(demo.page_prefix)]
        headline(console, f"{len(pages):,} pages of the PostgreSQL manual, model {demo.model}")
        recreate(connection, demo, pages, console)
        shortfalls = drain(connection, demo, pages, console)
        build_index(connection, demo, console)
        _show_searches(connection, demo, console)
        known = {page.name for page in pages}
        terms = {term: found & known for term, found in read_index_terms(folder).items() if found & known}
        recall, missed = _measure_recall(connection, demo, terms, console)
        shortfalls += missed
        shortfalls += _edit(connection, demo, console)
        shortfalls += _delete(connection, demo, console)
    _say_what_next(demo, console, time.perf_counter() - started)
    figures = ", ".join(f"{mode} [bold]{value:.3f}[/bold]" for mode, value in recall.items())
    console.print(f"recall@{_K} over the manual's own index: {figures}")
    return shortfalls


def headline(console: Console, text: str) -> None:
    """Print the title of the next step."""
    console.print(f"\n[bold]{escape(text)}[/bold]")


def _quote(text: str, width: int = 150) -> str:
    line = " ".join(text.split())
    return escape(line if len(line) <= width else line[: width - 1] + "…")


def scalar(connection: psycopg.Connection[Any], query: Any, parameters: Iterable[object] = ()) -> Any:
    """Return the first column of the only row; None without one."""
    row = connection.execute(query, tuple(parameters)).fetchone()
    return None if row is None else row[0]


def recreate(connection: psycopg.Connection[Any], demo: Demo, pages: list[Page], console: Console) -> None:
    """Recreate table and pipeline.

    A table of that name that is not the demo's is left alone.
    """
    table = sql.Identifier("public", demo.name)
    comment = scalar(connection, "SELECT obj_description(to_regclass(%s))", [f"public.{demo.name}"])
    exists = scalar(connection, "SELECT to_regclass(%s) IS NOT NULL", [f"public.{demo.name}"])
    if exists and comment != _TABLE_COMMENT:
        raise DemoFailed(f"table public.{demo.name} is not the demo's; rename it, or run the demo in another database")
    if scalar(connection, "SELECT count(*) FROM embedline.pipeline WHERE name = %s", [demo.name]):
        _with_patience(lambda: connection.execute("SELECT embedline.drop_pipeline(%s)", (demo.name,)))
    connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
    connection.execute(sql.SQL("CREATE TABLE {} (page text PRIMARY KEY, title text, body text)").format(table))
    connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(table, _TABLE_COMMENT))
    copy_in = sql.SQL("COPY {} (page, title, body) FROM STDIN").format(table)
    with connection.cursor() as cursor, cursor.copy(copy_in) as copy:
        for page in pages:
            copy.write_row((page.name, page.title, page.body))
    connection.execute(sql.SQL("ANALYZE {}").format(table))
    console.print(f"table [cyan]{demo.name}[/cyan] (page text primary key, title text, body text) is loaded")
    view = scalar(
        connection,
        "SELECT embedline.create_pipeline(%s, %s::regclass, %s, %s, keyword => 'english')",
        [demo.name, f"public.{demo.name}", _CONTENT, demo.model],
    )
    statement = (
        f"SELECT embedline.create_pipeline('{demo.name}', '{demo.name}', $${_CONTENT}$$, '{demo.model}',"
        " keyword => 'english');"
    )
    console.print(f"[green]{escape(statement)}[/green]\n  → routing view {escape(str(view))}", soft_wrap=True)


def _with_patience(action: Callable[[], object]) -> None:
    """Run a statement that may meet a worker's short locks.

    Its own lock_timeout ends each attempt.
    """
    for left in reversed(range(_LOCK_TRIES)):
        try:
            action()
            return
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            if not left:
                raise


def drain(connection: psycopg.Connection[Any], demo: Demo, pages: list[Page], console: Console) -> list[str]:
    """Embed everything, and return the rows that were not embedded.

    The scheduled worker takes part if it is there already.
    """
    started = time.perf_counter()
    with console.status("starting the model host, if it does not run (a process beside the server)"):
        connection.execute("SELECT embedline.embed_query(%s, 'hello')", (demo.name,))
    console.print(f"model host answers after {time.perf_counter() - started:.2f} s")
    started = time.perf_counter()
    with _progress(console) as progress:
        task = progress.add_task(f"SELECT embed_pending({_ROWS_PER_CALL}, '{demo.name}')", total=len(pages))
        _embed_all(connection, demo, lambda done: progress.update(task, completed=done))
    seconds = time.perf_counter() - started
    view = sql.Identifier("public", f"{demo.name}_embedding")
    counts = connection.execute(
        sql.SQL("SELECT count(DISTINCT page), count(embedding) FROM {}").format(view)
    ).fetchone() or (0, 0)
    console.print(
        f"[bold]{counts[0]:,}[/bold] pages, [bold]{counts[1]:,}[/bold] chunks in {seconds:.1f} s: "
        f"[bold]{counts[1] / seconds:,.0f} chunks/s[/bold] (read, cleaned, chunked, embedded, written, committed)"
    )
    if counts[0] != len(pages):
        return [f"{len(pages) - counts[0]} of {len(pages)} pages were left unembedded; see embedline.dead_letter"]
    return []


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _embed_all(connection: psycopg.Connection[Any], demo: Demo, report: Callable[[int], None]) -> None:
    count_pages = sql.SQL("SELECT count(DISTINCT page) FROM {}").format(
        sql.Identifier("public", f"{demo.name}_embedding")
    )
    before, moved_at = -1, time.monotonic()
    while True:
        embedded = scalar(connection, "SELECT public.embed_pending(%s, %s)", [_ROWS_PER_CALL, demo.name])
        pending, complete, dead, last_error, _ = _status(connection, demo)
        done = int(scalar(connection, count_pages))
        report(done + dead)
        if complete and not pending:
            return
        if done != before:
            before, moved_at = done, time.monotonic()
        if time.monotonic() - moved_at > _STALLED_SECONDS:
            raise DemoFailed(f"nothing was embedded for {_STALLED_SECONDS:.0f} s; last error: {last_error or 'none'}")
        if not embedded:
            # The scheduled worker has claimed the rest, or it waits for its retry.
            time.sleep(0.05)


def _status(connection: psycopg.Connection[Any], demo: Demo) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(_STATUS, (demo.name,)).fetchone()
    if row is None:
        raise DemoFailed(f'pipeline "{demo.name}" was dropped meanwhile; is another demo running in this database?')
    return row


def build_index(connection: psycopg.Connection[Any], demo: Demo, console: Console) -> None:
    """Build the pipeline's HNSW index."""
    started = time.perf_counter()
    with console.status("building the HNSW index CONCURRENTLY"):
        statement = build(PsycopgClient(connection), demo.name)
    if statement is not None:
        console.print(f"[green]{escape(statement)}[/green]", soft_wrap=True)
    console.print(f"HNSW index valid after {time.perf_counter() - started:.1f} s")


def _show_searches(connection: psycopg.Connection[Any], demo: Demo, console: Console) -> None:
    headline(console, "Five searches by vectors, by keywords, and by both: the best page and its best chunk")
    for question in demo.questions:
        console.print(f"[bold]?[/bold] {escape(question)}")
        for mode in _MODES:
            started = time.perf_counter()
            row = connection.execute(_SEARCH_BY, (demo.name, question, 1, mode)).fetchone()
            _show_mode(console, mode, row, time.perf_counter() - started)
    # A scalar subquery is run once; embed_query() itself in ORDER BY would run for each row of an exact search.
    query = sql.SQL(
        "SELECT page, chunk, 1 - (embedding <=> (SELECT embedline.embed_query(%(pipeline)s, %(question)s))) AS score\n"
        "  FROM {} WHERE title LIKE %(pattern)s\n"
        "  ORDER BY embedding <=> (SELECT embedline.embed_query(%(pipeline)s, %(question)s)) LIMIT 1"
    ).format(sql.Identifier(f"{demo.name}_embedding"))
    question = demo.filtered_question[0]
    parameters = {"pipeline": demo.name, "question": question, "pattern": demo.title_pattern}
    started = time.perf_counter()
    row = connection.execute(query, parameters).fetchone()
    seconds = time.perf_counter() - started
    console.print(f"  the next through the routing view, WHERE title LIKE '{escape(demo.title_pattern)}':")
    _show_hit(console, question, row, seconds)


def _show_mode(console: Console, mode: str, row: tuple[Any, ...] | None, seconds: float) -> None:
    """Print the best hit of a mode in a line; keywords may find none."""
    found = "nothing" if row is None else f"[cyan]{escape(row[0]):28}[/cyan] {row[2]:7.3f}  {_quote(row[1], 20)}"
    console.print(f"  {mode:8} [dim]{seconds * 1000:4.0f} ms[/dim]  {found}")


def _show_hit(console: Console, question: str, row: tuple[Any, ...] | None, seconds: float) -> None:
    if row is None:
        raise DemoFailed(f"search found nothing for: {question}")
    console.print(f"[bold]?[/bold] {escape(question)}  [dim]{seconds * 1000:.0f} ms[/dim]")
    console.print(f"  [cyan]{escape(row[0])}[/cyan] {row[2]:.3f}  {_quote(row[1])}")


def _measure_recall(
    connection: psycopg.Connection[Any], demo: Demo, terms: dict[str, frozenset[str]], console: Console
) -> tuple[dict[str, float], list[str]]:
    """Search each term of the manual's own index, by each mode.

    The pages that it names are the right answers. Return the recall of each mode, and the broken promises.
    """
    headline(console, f"Recall@{_K} over the manual's own index, {len(terms):,} terms")
    recall = {mode: _recall_by(connection, demo, terms, mode, console) for mode in _MODES}
    console.print(
        f"  [dim]each term is a query, the pages its entry names are relevant: share of them among the {_K} best"
        f" distinct pages (of at most {_K}), mean over the terms[/dim]"
    )
    missed = [
        f"recall@{_K} by {mode} is {recall[mode]:.3f}; {promised:.2f} was promised"
        for mode, promised in demo.required_recall.items()
        if recall[mode] < promised
    ]
    return recall, missed


def _recall_by(
    connection: psycopg.Connection[Any], demo: Demo, terms: dict[str, frozenset[str]], mode: str, console: Console
) -> float:
    started = time.perf_counter()
    shares = []
    with _progress(console) as progress, connection.cursor() as cursor:
        task = progress.add_task(f"searching index terms by {mode}", total=len(terms))
        for term, relevant in terms.items():
            rows = cursor.execute(_SEARCH_BY, (demo.name, term, _K, mode), prepare=True).fetchall()
            shares.append(recall_at_k([row[0] for row in rows], relevant, _K))
            progress.advance(task)
    seconds = time.perf_counter() - started
    recall = sum(shares) / len(shares)
    console.print(
        f"{mode:8} recall@{_K} = [bold]{recall:.3f}[/bold] in {seconds:.1f} s ({seconds / len(terms) * 1000:.1f} ms a search)"
    )
    return recall


def _edit(connection: psycopg.Connection[Any], demo: Demo, console: Console) -> list[str]:
    """Commit an edit and wait until search sees it.

    Only the scheduled worker embeds it.
    """
    headline(console, "An edit, seen by search through the scheduled worker alone")
    await_worker(connection, console)
    update = sql.SQL("UPDATE {} SET body = body || E'\\n\\n' || %s WHERE page = %s").format(
        sql.Identifier("public", demo.name)
    )
    with connection.transaction():
        connection.execute(update, (_EDIT_TEXT, demo.edited_page))
        # The clock starts here, so it counts the commit itself, too.
        committed_at = time.perf_counter()
    while not _sees_edit(connection, demo):
        if time.perf_counter() - committed_at > _VISIBLE_SECONDS:
            raise DemoFailed(
                f"search does not see the edit after {_VISIBLE_SECONDS:.0f} s; last error: {_status(connection, demo)[3]}"
            )
        time.sleep(0.005)
    seconds = time.perf_counter() - committed_at
    console.print(f"{demo.edited_page} now ends: “{_EDIT_TEXT}”")
    console.print(f"[bold]?[/bold] {_EDIT_QUESTION}  found [bold]{seconds * 1000:.0f} ms[/bold] after the COMMIT")
    if demo.required_visible_seconds is not None and seconds >= demo.required_visible_seconds:
        return [f"the edit was searchable after {seconds:.2f} s; {demo.required_visible_seconds:.0f} s was promised"]
    return []


def await_worker(connection: psycopg.Connection[Any], console: Console) -> None:
    """Make sure that pg_cron runs a resident worker."""
    if scalar(connection, _HAS_WORKER):
        return
    if scalar(connection, "SELECT to_regclass('cron.job') IS NULL") or not scalar(
        connection,
        "SELECT count(*) FROM cron.job WHERE database = current_database() AND jobname LIKE 'embedline worker %%'",
    ):
        connection.execute("SELECT embedline.schedule_workers(1)")
    limit = time.monotonic() + _WORKER_SECONDS
    with console.status("waiting for pg_cron, which starts the worker on the full minute (only the first time)"):
        while not scalar(connection, _HAS_WORKER):
            if time.monotonic() > limit:
                raise DemoFailed("pg_cron started no worker; see cron.job_run_details and the server's log")
            time.sleep(0.1)
    console.print("pg_cron has started the worker: CALL embedline.run_worker()")


def _sees_edit(connection: psycopg.Connection[Any], demo: Demo) -> bool:
    rows = connection.execute(_SEARCH, (demo.name, _EDIT_QUESTION, 3), prepare=True).fetchall()
    return any(row[0] == demo.edited_page and _EDIT_WORD in row[1] for row in rows)


def _delete(connection: psycopg.Connection[Any], demo: Demo, console: Console) -> list[str]:
    """Delete a page, and check that the next search does not find it.

    Its chunks are deleted in the same transaction.
    """
    headline(console, "A DELETE, gone from search at once")
    question = "garbage-collect a database with VACUUM"

    def found() -> bool:
        return demo.deleted_page in {row[0] for row in connection.execute(_SEARCH, (demo.name, question, _K))}

    before = found()
    delete = sql.SQL("DELETE FROM {} WHERE page = %s").format(sql.Identifier("public", demo.name))
    connection.execute(delete, (demo.deleted_page,))
    after = found()
    console.print(
        f"[bold]?[/bold] {question}\n  {demo.deleted_page} among the first {_K} before the DELETE: "
        f"{_yes(before)}, in the first search after it: {_yes(after)}"
    )
    if not before or after:
        return [f"{demo.deleted_page} should be found before its DELETE and not after it"]
    return []


def _yes(value: bool) -> str:
    return "[bold]yes[/bold]" if value else "[bold]no[/bold]"


def _say_what_next(demo: Demo, console: Console, seconds: float) -> None:
    headline(console, f"Done in {seconds:.0f} s. What to type next")
    searching = f"SELECT key, score, chunk FROM embedline.search('{demo.name}', 'how do I tune autovacuum?', 3);"
    other = "minilm" if demo.model == "static-256" else "static-256"
    for command, meaning in (
        ("make psql", "then, for example:"),
        (f"  {searching}", ""),
        (f"  \\d {demo.name}_embedding", "the routing view: any SQL may rank and filter with it"),
        ("  SELECT * FROM embedline.status;", "what waits, what works, what failed"),
        (f"  UPDATE {demo.name} SET body = body || '…' WHERE page = '…';", "and search again"),
        (f"make demo MODEL={other}", "the same with the other model"),
        ("less docs/reference/index.md", "every function, with examples"),
    ):
        console.print(
            f"  [green]{escape(command)}[/green]{'  ' if meaning else ''}[dim]{escape(meaning)}[/dim]", soft_wrap=True
        )
