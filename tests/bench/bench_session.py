"""Whether the later searches of a session are as fast as its first ones, for each kind of key, size and form of search.

From its sixth execution on a prepared statement may have a generic plan. Each session is new and makes twelve searches. The
first one loads the package and is left out. The median of the seventh to the twelfth is compared with the median of the
second to the fifth. There are as many sessions as rounds.

EMBEDLINE_BENCH_ROWS=1000,60000,300000 sets the sizes.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass

from harness import Bench, Figure, scalar, timed
from packages import summaries
from workers import Session, spread

from embedline.client import build_index
from generated_names import Generated

MODEL, DEFAULT_ROWS = "static-256", "1000,60000"
SEARCHES, EARLY, LATE = 12, slice(1, 5), slice(6, 12)
SLOWER = 1.2
# Kind of key: columns of the source, their values from a row's number, the key.
KEYS = {
    "integer": ("id bigint", "n", "id"),
    "uuid": ("id uuid", "md5(n::text)::uuid", "id"),
    "text": ("id text", "'row ' || n", "id"),
    "two columns": ("shelf integer, place bigint", "n % 100, n", "shelf, place"),
}
FORMS = {"": "k => 10", ", 50 documents": "k => 50, per_document => true"}


@dataclass(frozen=True)
class Source:
    """A source of one kind of key and one size; its pipeline has the same name."""

    kind: str
    rows: int

    @property
    def name(self) -> str:
        return f"bench_{self.kind.replace(' ', '_')}_{self.rows}"


def run(bench: Bench) -> None:
    """Embed every source, then open new sessions on each in turn."""
    sizes = sorted(int(size) for size in os.environ.get("EMBEDLINE_BENCH_ROWS", DEFAULT_ROWS).split(","))
    texts = summaries(sizes[-1] + SEARCHES).texts
    queries = texts[sizes[-1] :]
    sources = [Source(kind, rows) for rows in sizes for kind in KEYS]
    with bench.connect() as session:
        session.execute("CREATE TABLE bench_text (n bigint PRIMARY KEY, body text NOT NULL)")
        with session.cursor().copy("COPY bench_text (n, body) FROM STDIN") as copy:
            for number, text in enumerate(texts[: sizes[-1]]):
                copy.write_row((number, text))
        for source in sources:
            _prepare(bench, session, source)
    early: dict[tuple[Source, str], list[float]] = {(source, form): [] for source in sources for form in FORMS}
    late: dict[tuple[Source, str], list[float]] = {(source, form): [] for source in sources for form in FORMS}
    task = bench.progress.add_task("New sessions", total=bench.rounds * len(early))
    for _ in range(bench.rounds):
        for source, form in early:
            seconds = _session(bench, source, form, queries)
            early[source, form].append(statistics.median(seconds[EARLY]) * 1000)
            late[source, form].append(statistics.median(seconds[LATE]) * 1000)
            bench.progress.update(task, advance=1)
    for source, form in early:
        first, later = early[source, form], late[source, form]
        mine, theirs = statistics.median(later), statistics.median(first)
        detail = f"{mine:.1f} ms against {theirs:.1f} ms; {spread([b / a for a, b in zip(first, later, strict=True)])}"
        label = f"{source.rows:,} rows, {source.kind}{form}: 7th to 12th against 2nd to 5th"
        bench.add(Figure(label, mine / theirs, "×", SLOWER, detail))


def _prepare(bench: Bench, session: Session, source: Source) -> None:
    columns, values, key = KEYS[source.kind]
    session.execute(f"CREATE TABLE {source.name} ({columns}, body text NOT NULL, PRIMARY KEY ({key}))")
    session.execute(
        f"INSERT INTO {source.name} ({key}, body) SELECT {values}, body FROM bench_text WHERE n < {source.rows}"
    )
    session.execute("SELECT embedline.create_pipeline(%s, %s::regclass, 'body', %s)", (source.name, source.name, MODEL))
    task = bench.progress.add_task(f"Embedding {source.rows:,} rows, {source.kind}", total=source.rows)
    while embedded := scalar(session, "SELECT embedline.embed_pending(1000, %s)", (source.name,)):
        bench.progress.update(task, advance=embedded)
    bench.progress.update(task, description=f"Building the index of {source.rows:,} rows, {source.kind}")
    build_index.build(build_index.PsycopgClient(session), source.name)
    # As autovacuum would within a minute.
    tables = ", ".join(f"{Generated(source.name)(table)}" for table in ("document", "chunk", "v1"))
    session.execute(f"VACUUM ANALYZE {source.name}, {tables}")
    bench.progress.remove_task(task)


def _session(bench: Bench, source: Source, form: str, queries: list[str]) -> list[float]:
    """Return the seconds of each search of a new session."""
    statement = f"SELECT key, chunk, score FROM embedline.search(%s, %s, {FORMS[form]})"
    with bench.connect() as session:
        return [timed(lambda q=query: session.execute(statement, (source.name, q)).fetchall()) for query in queries]
