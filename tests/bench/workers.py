"""What the benches of the worker share: a model behind the stub, a source of short rows, a resident worker, and the check.

A bench that counts rows as done counts the vectors stored and the texts sent, and looks a vector up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from harness import Bench, scalar, timed

from generated_names import Generated
from stub_provider import StubProvider, vector_of

Session = psycopg.Connection[Any]


def register_stub(session: Session, provider: StubProvider, **limits: int) -> str:
    """Register the stub as a model; `limits` are parameters of create_model. Return the model's name."""
    name = f"stub-{provider.dimensions}"
    named = "".join(f", {parameter} => %s" for parameter in limits)
    query = f"SELECT embedline.create_model(%s, 'openai', 'stub', base_url => %s{named})"
    scalar(session, query, (name, provider.url, *limits.values()))
    return name


def recreate_source(session: Session, pipeline: str = "bench") -> None:
    """Make the source of a pipeline anew, `<pipeline>_source`: empty, and without the pipeline."""
    if scalar(session, "SELECT count(*) FROM embedline.pipeline WHERE name = %s", (pipeline,)):
        session.execute("SELECT embedline.drop_pipeline(%s)", (pipeline,))
    session.execute(f"DROP TABLE IF EXISTS {pipeline}_source")
    session.execute(f"CREATE TABLE {pipeline}_source (id bigint PRIMARY KEY, body text NOT NULL, n integer DEFAULT 0)")


def fill(session: Session, rows: range, pipeline: str = "bench") -> None:
    """Insert rows with these ids, all in one statement; a body has about 45 characters and is one chunk."""
    session.execute(
        f"INSERT INTO {pipeline}_source (id, body) SELECT g, 'row ' || g || ' of ' || md5(g::text)"
        " FROM generate_series(%s::bigint, %s) AS g",
        (rows[0], rows[-1]),
    )


def create_pipeline(session: Session, model: str, pipeline: str = "bench", **options: object) -> None:
    """Watch the source's body; without an index unless the options say so."""
    given = {"index_method": "none", **options}
    named = "".join(f", {parameter} => %s" for parameter in given)
    query = f"SELECT embedline.create_pipeline(%s, %s::regclass, 'body', %s{named})"
    scalar(session, query, (pipeline, f"{pipeline}_source", model, *given.values()))


def drain(session: Session, pipeline: str | None = None) -> float:
    """Let this session work until nothing waits; return the seconds."""
    return timed(
        lambda: session.execute("CALL embedline.run_worker(pipeline_name => %s, until_idle => true)", (pipeline,))
    )


def check_count(session: Session, stored: int, texts: int, rows: int, pipeline: str = "bench") -> None:
    """Raise SystemExit unless `stored` vectors are in the table and `texts`, of `rows` rows, were sent."""
    vectors = scalar(session, f"SELECT count(*) FROM {Generated(pipeline)('v1')}")
    if vectors != stored or texts != rows:
        raise SystemExit(f"{vectors} vectors stored, not {stored}; {texts} texts sent for {rows} rows")


def check_vector(session: Session, provider: StubProvider, key: int, pipeline: str = "bench") -> None:
    """Raise SystemExit unless the routing view has a row's own content with that content's vector."""
    row = session.execute(
        f"SELECT body, chunk, embedding::real[] FROM {pipeline}_embedding WHERE id = %s", (key,)
    ).fetchone()
    if row is None or row[0] != row[1]:
        raise SystemExit(f"row {key} is not embedded as it is: {row and row[:2]}")
    wanted = vector_of(row[1], provider.dimensions)
    if np.abs(np.asarray(row[2]) - wanted / np.linalg.norm(wanted)).max() > 1e-5:
        raise SystemExit(f"the vector stored for row {key} is not that of its text")


@contextmanager
def resident_worker(bench: Bench, pipeline: str | None = None) -> Iterator[int]:
    """Run a resident worker in a session of its own for the length of a block; yield its process id."""
    errors: list[BaseException] = []

    def work(session: Session) -> None:
        try:
            session.execute("CALL embedline.run_worker(pipeline_name => %s, slot => 1)", (pipeline,))
        except BaseException as error:
            errors.append(error)

    with bench.connect() as session, bench.connect() as control:
        thread = threading.Thread(target=work, args=(session,))
        thread.start()
        try:
            wait_until(lambda: scalar(control, "SELECT count(*) FROM embedline.worker"), "the worker works")
            yield session.info.backend_pid
        finally:
            control.execute("SELECT embedline.unschedule_workers()")
            thread.join()
    if errors:
        raise errors[0]


@contextmanager
def remote_workers(bench: Bench, session: Session, count: int) -> Iterator[None]:
    """Run `embedline remote-worker` in so many processes for the length of a block."""
    command = [str(Path(sys.executable).with_name("embedline")), "remote-worker", "bench", "--dsn", bench.dsn]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)]
    try:
        wait_until(lambda: scalar(session, "SELECT count(*) FROM embedline.worker") == count, "the workers are there")
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


def pending(session: Session) -> int:
    """Return how many changes wait or are in work."""
    return int(scalar(session, "SELECT pending FROM embedline.status WHERE pipeline = 'bench'"))


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process of this machine has taken, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Return once the condition is true; raise SystemExit after `seconds`."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise SystemExit(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.02)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Say what a figure's rounds were, from least to most."""
    return f"rounds {min(values):{form}} to {max(values):{form}}"
