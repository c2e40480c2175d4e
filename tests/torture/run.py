"""Write, kill and check: `make torture SEED=1 SECONDS=600`.

Clients write to three sources at three isolation levels, workers embed, and all of them are killed again and again. In the end
every row's chunks are computed again, and compared with what is stored. A seed gives each client the same statements again.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import secrets
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime

import psycopg

import throwaway
from embedline.core.tokens import CHARACTERS_PER_TOKEN
from embedline.dev.cluster.server import Cluster
from killing import reconnect
from stub_provider import StubProvider, stub_provider
from support import install, settle
from torture.check import PARTED_TOKENS, PLAIN_CHARACTERS, Findings, check, check_spending
from torture.kills import KINDS, Killer, workers_killed
from torture.script import PAIR, PARTED, PLAIN, SOURCES, Script, digest
from torture.sessions import Client, Worker, running
from working import create_stub_model, work_until_idle

CLIENTS, WORKERS = 8, 4
DIMENSIONS = 16
# Texts of one request, and requests of one worker in flight.
REQUEST, IN_FLIGHT = 8, 2
# Texts that a killed worker may have paid for and not written: those in flight, and as many answered in the moment before.
OF_A_KILLED_WORKER = 2 * REQUEST * IN_FLIGHT
_ROWS = 200
_SHORT = 60


@dataclass(frozen=True)
class Run:
    """A finished run."""

    seed: int
    seconds: float
    clients: list[Client]
    kills: Counter[str]
    quarantined: int
    found: Findings
    worker_deadlocks: list[str]

    @property
    def may_be_over(self) -> int:
        """Texts that the killed workers may have paid for in vain."""
        return OF_A_KILLED_WORKER * workers_killed(self.kills, WORKERS)


def torture(cluster: Cluster, seed: int, seconds: float, *, kills: bool = True) -> Run:
    """Run it on a server that has Embedline and static-256, and nothing else."""
    with stub_provider(DIMENSIONS) as stub:
        with contextlib.closing(reconnect(cluster)) as connection:
            _prepare(connection, stub, seed)
        ended, rested = threading.Event(), threading.Event()
        clients = [Client(cluster.dsn(), ended, seed, number) for number in range(CLIENTS)]
        workers = [Worker(cluster.dsn(), rested) for _ in range(WORKERS)]
        killer = Killer(cluster, seed, ended, clients, workers)
        with running(workers, rested), running(clients, ended):
            if kills:
                killer.start()
            begun = time.monotonic()
            backfilled_at = _backfilled_at(cluster, seconds)
            ended.wait(seconds - (time.monotonic() - begun))
            ended.set()
            if kills:
                killer.join(120)
        assert killer.error is None, killer.error
        assert not killer.is_alive()
        with contextlib.closing(reconnect(cluster)) as connection:
            quarantined = _drain(connection)
            found = check(connection, DIMENSIONS)
            check_spending(connection, stub, backfilled_at, found)
    pids = {str(pid) for worker in workers for pid in worker.pids}
    named = re.compile(r"[Pp]rocess (\d+)")
    deadlocks = [told for client in clients for told in client.deadlocks if pids & set(named.findall(told))]
    return Run(seed, seconds, clients, killer.counts, quarantined, found, deadlocks)


def _prepare(connection: psycopg.Connection, stub: StubProvider, seed: int) -> None:
    """Create the sources with some rows, and the pipelines, whose backfill is still to be done."""
    stub.behave(latency=0.03, remember=True)
    create_stub_model(connection, stub, max_batch_items=REQUEST, concurrency=IN_FLIGHT)
    connection.execute("CREATE TABLE audit (source text, body text, at timestamptz DEFAULT clock_timestamp())")
    connection.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " INSERT INTO public.audit (source, body) VALUES (TG_ARGV[0], NEW.body); RETURN NULL; END$$"
    )
    for source in SOURCES:
        connection.execute(source.create.encode())
        for first, last in zip(source.partitions, source.partitions[1:], strict=False):
            connection.execute(
                f"CREATE TABLE {source.name}_{first} PARTITION OF {source.name} FOR VALUES FROM ({first}) TO ({last})"
            )
        changed = "NEW.body IS NOT NULL AND OLD.* IS DISTINCT FROM NEW.* AND OLD.views = NEW.views"
        for event, condition in (("INSERT", "NEW.body IS NOT NULL"), ("UPDATE", changed)):
            connection.execute(
                f"CREATE TRIGGER note_{event} AFTER {event} ON {source.name} FOR EACH ROW WHEN ({condition})"
                f" EXECUTE FUNCTION note('{source.name}')"
            )
        keys = "n" if len(source.keys) == 1 else "n %% 3, 'n,' || n || '\"'"
        connection.execute(
            f"INSERT INTO {source.name} SELECT {keys}, '{source.name} first ' || n || repeat(' word', n %% 40)"
            " FROM generate_series(0, %s) AS n",
            (_ROWS - 1,),
        )
    create = "SELECT embedline.create_pipeline(%s, %s, 'body', %s, chunking => %s, chunk_tokens => %s, index_method => 'none'"
    connection.execute(
        f"{create})", (PLAIN.name, PLAIN.name, "stub", "fixed", PLAIN_CHARACTERS // CHARACTERS_PER_TOKEN)
    )
    connection.execute(f"{create})", (PARTED.name, PARTED.name, "static-256", "fixed", PARTED_TOKENS))
    connection.execute(f"{create}, filter => 'live')", (PAIR.name, PAIR.name, "stub", "none", None))


def _backfilled_at(cluster: Cluster, seconds: float) -> datetime | None:
    """Wait until the backfill is complete; return the server's time then, None if it is not within `seconds`."""
    limit = time.monotonic() + seconds
    query = "SELECT clock_timestamp(), bool_and(backfill_complete) FROM embedline.status"
    while time.monotonic() < limit:
        with contextlib.suppress(psycopg.Error), contextlib.closing(reconnect(cluster)) as connection:
            now, is_complete = connection.execute(query).fetchone()
            if is_complete:
                return now
        time.sleep(0.1)
    return None


def _drain(connection: psycopg.Connection) -> int:
    """Have everything embedded; return the number of rows that were quarantined, which are tried again by then.

    A row that was in flight in three kills counts as one that kills its workers. That is the promise, not a fault.
    """
    work_until_idle(connection, WORKERS, 120)
    settle(connection, 60)
    letters = connection.execute("SELECT error_code, message FROM embedline.dead_letter").fetchall()
    assert {code for code, _ in letters} <= {"EL020"}, letters[:5]
    for source in SOURCES:
        connection.execute("SELECT embedline.requeue(%s)", (source.name,))
    work_until_idle(connection, 1, 60)
    settle(connection, 60)
    return len(letters)


def table(run: Run) -> str:
    """Return the table of a run."""
    statements, outcomes = Counter[str](), Counter[str]()
    for client in run.clients:
        statements += client.statements
        outcomes += client.outcomes
    found = run.found
    rows: list[tuple[str, object]] = [
        ("seed, seconds", f"{run.seed}, {run.seconds:g}"),
        ("clients, workers", f"{CLIENTS}, {WORKERS}"),
        *((f"transactions {name}", count) for name, count in sorted(outcomes.items())),
        *((f"statements: {name}", count) for name, count in sorted(statements.items())),
        *((kind, run.kills[kind]) for kind in KINDS),
        ("rows checked, chunks checked", f"{found.rows}, {found.chunks}"),
        ("missing", found.missing),
        ("stale", found.stale),
        ("orphaned", found.orphaned),
        ("twice", found.twice),
        ("left in a queue or claimed by the dead", found.left),
        ("quarantined after three kills, then tried again", run.quarantined),
        ("deadlocks between a client and a worker", len(run.worker_deadlocks)),
        ("texts paid for", found.paid),
        ("of them more often than asked for", found.over),
        ("may be, by what the killed workers had in flight", run.may_be_over),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def judge(run: Run) -> None:
    """Fail unless the run was sound."""
    told = "\n".join([*run.found.examples, *run.worker_deadlocks, table(run)])
    assert run.found.faults == 0, told
    assert not run.worker_deadlocks, told
    assert run.found.over <= run.may_be_over, told


def main() -> int:
    """Run the torture from a shell; return the number to exit with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--seconds", type=float, default=_SHORT)
    parser.add_argument("--print", type=int, metavar="N", help="print each client's first N transactions instead")
    parser.add_argument(
        "--no-kills", action="store_true", help="let everything live: nothing may be paid for in vain then"
    )
    options = parser.parse_args()
    if options.print:
        for number in range(CLIENTS):
            print(f"client {number}: {digest(options.seed, number, options.print)}")
            for _, transaction in zip(range(options.print), Script(options.seed, number), strict=False):
                print(f"  {transaction}")
        return 0
    print(f"seed {options.seed}", flush=True)
    cluster = throwaway.start_server({"synchronous_commit": "on", "full_page_writes": "on"})
    try:
        install(cluster.dsn(), models=("static-256",))
        run = torture(cluster, options.seed, options.seconds, kills=not options.no_kills)
    finally:
        throwaway.remove_server(cluster)
    print(table(run))
    judge(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
