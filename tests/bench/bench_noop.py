"""10,000 updates that change no content: nothing may be enqueued, and nothing sent."""

from __future__ import annotations

from harness import Bench, Figure
from workers import Session, check_count, create_pipeline, drain, fill, pending, recreate_source, register_stub

from stub_provider import stub_provider

ROWS = 10_000
ONE = "UPDATE bench_source SET {} WHERE id = %s"
ALL = "UPDATE bench_source SET {}"


def run(bench: Bench) -> None:
    """Make each kind of update on rows that are embedded; count what waits and what is sent."""
    with stub_provider(64) as provider, bench.connect() as session:
        model = register_stub(session, provider)
        recreate_source(session)
        create_pipeline(session, model)
        fill(session, range(1, ROWS + 1))
        provider.counts()
        drain(session)
        check_count(session, ROWS, provider.counts()["texts"], ROWS)
        cases = {
            "body = body, in one statement": (lambda: _all(session, ALL.format("body = body")), 0),
            "body = body, 10,000 statements": (lambda: _each(session, ONE.format("body = body")), 0),
            "an unrelated column, in one statement": (lambda: _all(session, ALL.format("n = n + 1")), 0),
            "an unrelated column, 10,000 statements": (lambda: _each(session, ONE.format("n = n + 1")), 0),
            # Each statement is looked at by itself: the worker finds the content as it was, and pays nothing.
            "changed and put back in one transaction": (lambda: _reverse(session), None),
        }
        task = bench.progress.add_task("Updating", total=len(cases))
        for label, (update, limit) in cases.items():
            update()
            bench.add(Figure(f"{label}: rows enqueued", pending(session), "rows", limit))
            drain(session)
            bench.add(Figure("  texts sent", provider.counts().get("texts", 0), "texts", 0))
            bench.progress.update(task, advance=1)


def _all(session: Session, statement: str) -> None:
    session.execute(statement)


def _each(session: Session, statement: str) -> None:
    with session.transaction(), session.cursor() as cursor:
        cursor.executemany(statement, [(key,) for key in range(1, ROWS + 1)])


def _reverse(session: Session) -> None:
    with session.transaction():
        session.execute("UPDATE bench_source SET body = 'x' || body")
        session.execute("UPDATE bench_source SET body = substr(body, 2)")
