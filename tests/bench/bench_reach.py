"""Whether search finds what exact ranking finds: a hundred off-topic sentences, and 1,000 queries of three kinds.

There are two corpora: the chunks of the PostgreSQL manual as the demo makes them, and 300,000 descriptions of packages.
Each sentence is inserted in a transaction of its own and embedded by a resident worker. A question about it is asked until
search returns it. All questions are asked again after each kind of maintenance. Exact ranking is computed here, from the
vectors of the routing view.

The time of a search is compared with that of the plain statement on the routing view, in turns. The plain statement has an
iterative scan in strict order and ef_search 40. Both sides embed the query.

EMBEDLINE_BENCH_CORPORA=manual leaves out the packages. `--rounds 2` asks 300 queries instead of 1,000.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from harness import Bench, Figure, percentile, scalar, timed
from manual import sentences
from off_topic import OFF_TOPIC
from packages import summaries
from rich.progress import TaskID
from workers import Session, drain, resident_worker, wait_until

from embedline.client import build_index
from embedline.core.vectors import vectors_from_send
from embedline.dev.demo.manual import manual_folder, read_index_terms, read_pages
from generated_names import Generated, qualified

MODEL = "static-256"
CORPORA = ("manual", "packages")
PACKAGES, ORDINARY = 300_000, 2_000
FIRST, K = 3, 10
# Milliseconds allowed from a COMMIT until search returns the row.
VISIBLE_MS = 1000
# Seconds between two searches for a new row, and from its vector's storing until it is given up.
POLL_SECONDS, PATIENCE_SECONDS = 0.01, 10.0
# Sentences given up with that patience. After as many, a sentence is given up once it is late.
PATIENT_TRIES = 5
RECALL_PERCENT, SLOWER = 99.0, 1.3
# Scores closer than this count as equal, because pgvector sums in single precision.
TOLERANCE = 1e-5
QUERIES_A_ROUND, MOST_QUERIES, WARM_UP = 150, 1_000, 20
KINDS = {"typical": 0.4, "terms": 0.3, "off-centre": 0.3}
SHOWN_MISSES = 5
SEED = 12

Floats = npt.NDArray[np.float32]
# Rows of search: key, chunk, score.
Found = list[tuple[str, str, float]]

SEARCH = "SELECT key, chunk, score FROM embedline.search(%s, %s, %s)"
# The statement of search before it did anything for rows that the index does not reach.
PLAIN = """
    CREATE FUNCTION bench_plain_{name}(query text, k integer)
    RETURNS TABLE (key text, chunk text, score double precision)
    LANGUAGE plpython3u
    SET search_path = pg_catalog, public, pg_temp
    SET jit = off
    SET hnsw.iterative_scan = 'strict_order'
    SET hnsw.ef_search = 40
    AS $python$
        if "bench_plain_{name}" not in GD:
            GD["bench_plain_{name}"] = (
                plpy.prepare("SELECT embedline.embed_query($1, $2)::text AS vector", ["text", "text"]),
                plpy.prepare(
                    "SELECT set_config('hnsw.ef_search', '40', true),"
                    " set_config('hnsw.iterative_scan', 'strict_order', true)"
                ),
                plpy.prepare(
                    "SELECT n.key::text AS key, n.chunk, 1 - n.distance AS score FROM (SELECT {key} AS key, chunk,"
                    " embedding <=> $1::vector AS distance FROM {name}_embedding ORDER BY embedding <=> $1::vector"
                    " LIMIT $2) AS n ORDER BY n.distance",
                    ["text", "bigint"],
                ),
            )
        embed, settings, rank = GD["bench_plain_{name}"]
        vector = plpy.execute(embed, ["{name}", query])[0]["vector"]
        plpy.execute(settings)
        return list(plpy.execute(rank, [vector, k]))
    $python$
"""


@dataclass(frozen=True)
class Corpus:
    """A source, the rows that come later, and queries that a person would type."""

    name: str
    key: str
    table: str
    content: str
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]
    ordinary: list[tuple[object, ...]]
    off_topic: list[tuple[object, ...]]
    terms: list[str]

    def insert(self, session: Session, row: tuple[object, ...]) -> None:
        """Insert one row; its COMMIT has returned when this returns."""
        places = ", ".join(["%s"] * len(self.columns))
        session.execute(f"INSERT INTO {self.name} ({', '.join(self.columns)}) VALUES ({places})", row)

    def copy(self, session: Session, rows: Sequence[tuple[object, ...]]) -> None:
        """Insert many rows in one statement."""
        with session.cursor().copy(f"COPY {self.name} ({', '.join(self.columns)}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)


class Stored:
    """Every chunk of the routing view with its vector, for exact ranking."""

    def __init__(self, session: Session, corpus: Corpus) -> None:
        rows = (
            session.cursor(binary=True)
            .execute(
                f"SELECT {corpus.key}::text, chunk, vector_send(embedding) FROM {corpus.name}_embedding"
                " WHERE embedding IS NOT NULL"
            )
            .fetchall()
        )
        self.matrix: Floats = vectors_from_send([row[2] for row in rows], "vector")
        self.chunks = [row[1] for row in rows]
        self.places: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.keys: dict[str, list[int]] = defaultdict(list)
        for place, (key, chunk, _) in enumerate(rows):
            self.places[key, chunk].append(place)
            self.keys[key].append(place)

    def scores(self, queries: Floats) -> Iterator[Floats]:
        """Yield the scores of all chunks for each query."""
        for start in range(0, len(queries), 50):
            yield from queries[start : start + 50] @ self.matrix.T


@dataclass
class Reach:
    """Sentences that exact ranking finds, how many of them search found, and the questions that it missed."""

    found: int = 0
    wanted: int = 0
    questions: list[str] = field(default_factory=list)


def run(bench: Bench) -> None:
    """Measure with each of the corpora."""
    names = [name for name in os.environ.get("EMBEDLINE_BENCH_CORPORA", ",".join(CORPORA)).split(",") if name]
    for name in names:
        if name not in CORPORA:
            raise SystemExit(f"there is no corpus {name}; there are {', '.join(CORPORA)}")
        with bench.connect() as session:
            corpus = _manual(session) if name == "manual" else _packages(bench)
            _load(bench, session, corpus)
            _insert_all(bench, session, corpus)
            _ask_again(bench, session, corpus, "once all are inserted")
            _maintain(session, corpus)
            _ask_again(bench, session, corpus, "after verify and a nightly run")
            corpus.copy(session, corpus.ordinary[1:])
            drain(session, corpus.name)
            _ask_again(bench, session, corpus, f"after {ORDINARY:,} ordinary rows")
            queries = _queries(bench, session, corpus)
            fresh = [query for _, query in queries][:: max(1, len(queries) // 200)]
            _compare(bench, corpus, fresh, f"search with {ORDINARY:,} fresh rows")
            _maintain(session, corpus)
            _ask_again(bench, session, corpus, "after the next nightly run")
            _recall(bench, session, corpus, queries)
            index = scalar(session, "SELECT name FROM embedline.index_progress(%s)", (corpus.name,))
            session.execute(f"REINDEX INDEX CONCURRENTLY {qualified(index)}")
            _ask_again(bench, session, corpus, "after REINDEX")


def _manual(session: Session) -> Corpus:
    folder = manual_folder(session.info.server_version // 10000)
    return Corpus(
        name="manual",
        key="page",
        table="page text PRIMARY KEY, title text, body text",
        content=r"title || E'\n\n' || body",
        columns=("page", "title", "body"),
        rows=[(page.name, page.title, page.body) for page in read_pages(folder)],
        ordinary=[(f"ordinary-{number}", "", text) for number, text in enumerate(sentences(ORDINARY + 1))],
        off_topic=[(f"off-topic-{number}", "", sentence) for number, (sentence, _) in enumerate(OFF_TOPIC)],
        terms=sorted(read_index_terms(folder)),
    )


def _packages(bench: Bench) -> Corpus:
    found = summaries(PACKAGES + ORDINARY + 1)
    origins = ", ".join(f"{count:,} {origin}" for origin, count in found.origins.items())
    bench.note(f"packages: {origins}")
    numbered: list[tuple[object, ...]] = list(enumerate(found.texts))
    return Corpus(
        name="packages",
        key="id",
        table="id bigint PRIMARY KEY, body text NOT NULL",
        content="body",
        columns=("id", "body"),
        rows=numbered[:PACKAGES],
        ordinary=numbered[PACKAGES:],
        off_topic=[(10_000_000 + number, sentence) for number, (sentence, _) in enumerate(OFF_TOPIC)],
        terms=[" ".join(word for word in text.split() if len(word) > 3)[:40] for text in found.texts[:PACKAGES]],
    )


def _load(bench: Bench, session: Session, corpus: Corpus) -> None:
    """Fill the source, embed it and build the index, as the documentation has it."""
    session.execute(f"CREATE TABLE {corpus.name} ({corpus.table})")
    corpus.copy(session, corpus.rows)
    session.execute(f"ANALYZE {corpus.name}")
    create = "SELECT embedline.create_pipeline(%s, %s::regclass, %s, %s)"
    session.execute(create, (corpus.name, corpus.name, corpus.content, MODEL))
    task = bench.progress.add_task(f"Embedding {corpus.name}", total=len(corpus.rows))
    while embedded := scalar(session, "SELECT embedline.embed_pending(1000, %s)", (corpus.name,)):
        bench.progress.update(task, advance=embedded)
    bench.progress.update(task, description=f"Building the index of {corpus.name}")
    # As autovacuum would within a minute.
    tables = ", ".join(f"{Generated(corpus.name)(table)}" for table in ("document", "chunk", "v1"))
    session.execute(f"VACUUM ANALYZE {corpus.name}, {tables}")
    seconds = timed(lambda: build_index.build(build_index.PsycopgClient(session), corpus.name))
    session.execute(PLAIN.format(name=corpus.name, key=corpus.key))
    chunks = scalar(session, f"SELECT count(*) FROM {corpus.name}_embedding")
    bench.add(Figure(f"{corpus.name}: corpus", chunks, "chunks", detail=f"HNSW built in {seconds:.0f} s"))
    bench.progress.remove_task(task)


def _maintain(session: Session, corpus: Corpus) -> None:
    session.execute("SELECT * FROM embedline.verify(%s, true)", (corpus.name,)).fetchall()
    drain(session, corpus.name)
    session.execute("CALL embedline.run_nightly()")
    drain(session, corpus.name)


def _insert_all(bench: Bench, session: Session, corpus: Corpus) -> None:
    """Insert the sentences one by one, and ask for each until search returns it."""
    stored, questions = Stored(session, corpus), _embed(session, corpus, [question for _, question in OFF_TOPIC])
    nearest = [np.sort(np.partition(scores, -FIRST)[-FIRST:]) for scores in stored.scores(questions)]
    del stored
    before, reach, arrivals = list[Floats](), Reach(), list[Arrival]()
    task = _task(bench, corpus, "Inserting")
    with resident_worker(bench, corpus.name):
        _warm_up(session, corpus)
        for row, (_, question), vector, others in zip(corpus.off_topic, OFF_TOPIC, questions, nearest, strict=True):
            rivals = np.append(others, [vector @ earlier for earlier in before])
            arrival = _await(session, corpus, row, question, (vector, rivals), len(reach.questions))
            arrivals.append(arrival)
            before.append(arrival.vector)
            if _is_first(float(vector @ arrival.vector), rivals):
                reach.wanted += 1
                reach.found += arrival.found_ms <= VISIBLE_MS
                if math.isinf(arrival.found_ms):
                    reach.questions.append(question)
            bench.progress.update(task, advance=1)
    bench.progress.remove_task(task)
    detail = f"of {len(OFF_TOPIC)} sentences, at the time of each COMMIT"
    bench.add(Figure(f"{corpus.name}: exact ranking has in its first {FIRST}", reach.wanted, "rows", detail=detail))
    label = f"{corpus.name}: search has within {VISIBLE_MS / 1000:.0f} s"
    detail = f"of {reach.wanted}; {len(reach.questions)} were given up"
    bench.add(Figure(label, reach.found, "rows", reach.wanted, detail, at_least=True))
    times = [arrival.found_ms for arrival in arrivals if not math.isinf(arrival.found_ms)] or [math.inf]
    detail = f"p50 {statistics.median(times):.0f}, p95 {percentile(times, 0.95):.0f} ms of the {len(times)} found"
    bench.add(Figure(f"{corpus.name}: longest from COMMIT to found", max(times), "ms", VISIBLE_MS, detail))
    # Tells a slow worker from a row that search does not reach.
    times = [arrival.stored_ms for arrival in arrivals]
    detail = f"p50 {statistics.median(times):.0f}, p95 {percentile(times, 0.95):.0f} ms, seen after a search"
    bench.add(Figure(f"{corpus.name}: longest from COMMIT to stored", max(times), "ms", detail=detail))
    _note_misses(bench, f"{corpus.name}, not found when inserted", reach)


def _warm_up(session: Session, corpus: Corpus) -> None:
    """Have the worker embed its first row, for which it imports what it needs, and search once."""
    row = corpus.ordinary[0]
    corpus.insert(session, row)
    wait_until(lambda: _vector(session, corpus, row[0]) is not None, "the worker has embedded its first row")
    session.execute(SEARCH, (corpus.name, OFF_TOPIC[0][1], FIRST)).fetchall()


@dataclass(frozen=True)
class Arrival:
    """When a new row's vector was stored and when search returned the row, in ms from its COMMIT; inf for never."""

    vector: Floats
    stored_ms: float
    found_ms: float


def _await(
    session: Session,
    corpus: Corpus,
    row: tuple[object, ...],
    question: str,
    asked: tuple[Floats, Floats],
    given_up: int,
) -> Arrival:
    """Insert a row and ask for it until search returns it, or until it is given up.

    A row that exact ranking does not have among its first is not waited for. Raises SystemExit if it is not embedded.
    """
    vector, rivals = asked
    patience_ms = PATIENCE_SECONDS * 1000 if given_up < PATIENT_TRIES else VISIBLE_MS
    corpus.insert(session, row)
    committed = time.perf_counter()
    own: Floats | None = None
    stored_ms = math.inf
    while True:
        found = session.execute(SEARCH, (corpus.name, question, FIRST)).fetchall()
        found_ms = (time.perf_counter() - committed) * 1000
        if own is None:
            own = _vector(session, corpus, row[0])
            stored_ms = (time.perf_counter() - committed) * 1000
        if own is not None:
            if str(row[0]) in {key for key, _, _ in found}:
                return Arrival(own, stored_ms, found_ms)
            if not _is_first(float(vector @ own), rivals) or found_ms - stored_ms > patience_ms:
                return Arrival(own, stored_ms, math.inf)
        elif stored_ms > 3 * PATIENCE_SECONDS * 1000:
            raise SystemExit(f"{corpus.name}: the worker has not embedded {row[0]} after {stored_ms / 1000:.0f} s")
        time.sleep(POLL_SECONDS)


def _is_first(score: float, rivals: Floats) -> bool:
    """Return True if fewer than three others score as much.

    Then every exact ranking has it among its first three, however it breaks ties.
    """
    return int((rivals >= score - TOLERANCE).sum()) < FIRST


def _vector(session: Session, corpus: Corpus, key: object) -> Floats | None:
    statement = f"SELECT vector_send(embedding) FROM {corpus.name}_embedding WHERE {corpus.key} = %s"
    rows = session.execute(statement, (key,)).fetchall()
    return vectors_from_send([rows[0][0]], "vector")[0] if rows and rows[0][0] is not None else None


def _ask_again(bench: Bench, session: Session, corpus: Corpus, when: str) -> None:
    """Ask every question; search must find each sentence that exact ranking finds."""
    stored, reach = Stored(session, corpus), Reach()
    questions = [question for _, question in OFF_TOPIC]
    ranked = zip(corpus.off_topic, questions, stored.scores(_embed(session, corpus, questions)), strict=True)
    for (key, *_), question, scores in ranked:
        places = stored.keys[str(key)]
        if len(places) != 1:
            raise SystemExit(f"{corpus.name}: {key} has {len(places)} chunks, not 1")
        if not _is_first(float(scores[places[0]]), np.delete(scores, places[0])):
            continue
        reach.wanted += 1
        found = session.execute(SEARCH, (corpus.name, question, FIRST)).fetchall()
        if str(key) in {row[0] for row in found}:
            reach.found += 1
        else:
            reach.questions.append(question)
    label, detail = f"{corpus.name}: search has {when}", f"of {reach.wanted} that exact ranking has"
    bench.add(Figure(label, reach.found, "rows", reach.wanted, detail, at_least=True))
    _note_misses(bench, f"{corpus.name}, not found {when}", reach)


def _note_misses(bench: Bench, label: str, reach: Reach) -> None:
    if reach.questions:
        more = "; …" if len(reach.questions) > SHOWN_MISSES else ""
        bench.note(f"{label}: {'; '.join(reach.questions[:SHOWN_MISSES])}{more}")


def _queries(bench: Bench, session: Session, corpus: Corpus) -> list[tuple[str, str]]:
    """Return (kind, query) in a shuffled order that is the same every time."""
    count = min(MOST_QUERIES, QUERIES_A_ROUND * bench.rounds)
    draw = random.Random(SEED)
    statement = f"SELECT chunk FROM {corpus.name}_embedding ORDER BY {corpus.key}, chunk"
    chunks = [row[0] for row in session.execute(statement)]
    questions = [question for _, question in OFF_TOPIC]
    wanted = {kind: round(share * count) for kind, share in KINDS.items()}
    typical = [_without_some(text, draw) for text in draw.sample(chunks, wanted["typical"])]
    terms = draw.sample(corpus.terms, wanted["terms"])
    third = wanted["off-centre"] // 3
    mixed = [_mixed(*draw.sample(questions, 2)) for _ in range(third)]
    half = [_mixed(draw.choice(questions), draw.choice(chunks)) for _ in range(wanted["off-centre"] - 2 * third)]
    kinds = {
        "typical": typical,
        "terms": terms,
        "off-centre": [*draw.choices(questions, k=third), *mixed, *half],
    }
    queries = [(kind, query) for kind, texts in kinds.items() for query in texts if query.strip()]
    draw.shuffle(queries)
    return queries


def _without_some(text: str, draw: random.Random) -> str:
    """Return a text without a sixth of its words."""
    words = text.split()
    kept = sorted(draw.sample(range(len(words)), max(1, len(words) - len(words) // 6)))
    return " ".join(words[place] for place in kept)


def _mixed(one: str, other: str) -> str:
    """Return the first words of two texts in one."""
    return " ".join([*one.split()[:8], *other.split()[:8]])


def _embed(session: Session, corpus: Corpus, queries: Sequence[str]) -> Floats:
    embed = "SELECT vector_send(embedline.embed_query(%s, %s))"
    return vectors_from_send([scalar(session, embed, (corpus.name, query)) for query in queries], "vector")


def _recall(bench: Bench, session: Session, corpus: Corpus, queries: list[tuple[str, str]]) -> None:
    """Compare search and the plain statement with exact ranking."""
    stored = Stored(session, corpus)
    found, plain = _compare(bench, corpus, [query for _, query in queries], "search")
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    plainly: list[float] = []
    task = _task(bench, corpus, "Ranking exactly", len(queries))
    vectors = _embed(session, corpus, [query for _, query in queries])
    for (kind, query), ours, theirs, scores in zip(queries, found, plain, stored.scores(vectors), strict=True):
        shares[kind].append(_share(stored, scores, ours, query))
        plainly.append(_share(stored, scores, theirs, query))
        bench.progress.update(task, advance=1)
    bench.progress.remove_task(task)
    every = [share for kind in shares.values() for share in kind]
    recall, perfect = statistics.fmean(every), sum(share == 1 for share in every)
    detail = f"{recall:.4f} over {len(every):,} queries, all {K} for {perfect:,}; plain statement {statistics.fmean(plainly):.4f}"
    bench.add(Figure(f"{corpus.name}: recall@{K} of search", recall * 100, "%", RECALL_PERCENT, detail, at_least=True))
    for kind, of_kind in shares.items():
        detail = f"{statistics.fmean(of_kind):.4f} over {len(of_kind)}, worst {min(of_kind):.1f}"
        bench.add(Figure(f"  {kind} queries", statistics.fmean(of_kind) * 100, "%", detail=detail))


def _share(stored: Stored, scores: Floats, rows: Found, query: str) -> float:
    """Return the share of the first ten that these rows are.

    A row that scores as much as the tenth is one of them.
    """
    least = np.partition(scores, -K)[-K] - TOLERANCE
    hits = 0
    for (key, chunk), count in Counter((key, chunk) for key, chunk, _ in rows).items():
        places = stored.places.get((key, chunk), [])
        # The same chunk twice counts twice only where it is stored twice.
        hits += int((scores[places[:count]] >= least).sum())
    for key, chunk, score in rows:
        places = stored.places.get((key, chunk), [])
        if not places or abs(scores[places].max() - score) > 10 * TOLERANCE:
            raise SystemExit(f"search says {score} of {key} for {query!r}: that is not its score")
    return min(hits, K) / K


def _compare(bench: Bench, corpus: Corpus, queries: list[str], label: str) -> tuple[list[Found], list[Found]]:
    """Ask search and the plain statement in turns in one session; return both results."""
    sides = {
        "search": (SEARCH, (corpus.name,)),
        "plain": (f"SELECT key, chunk, score FROM bench_plain_{corpus.name}(%s, %s)", ()),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, list[Found]] = {side: [] for side in sides}
    task = _task(bench, corpus, "Searching", len(queries))
    with bench.connect() as session:
        for turn, query in enumerate([*queries[:WARM_UP], *queries], start=-WARM_UP):
            for side in sorted(sides, reverse=turn % 2 == 0):
                statement, parameters = sides[side]
                start = time.perf_counter()
                rows = session.execute(statement, (*parameters, query, K)).fetchall()
                if turn >= 0:
                    seconds[side].append((time.perf_counter() - start) * 1000)
                    found[side].append(rows)
            bench.progress.update(task, advance=turn >= 0)
    bench.progress.remove_task(task)
    for name, share, limit in (("p95", 0.95, SLOWER), ("p50", 0.5, None)):
        ours, theirs = percentile(seconds["search"], share), percentile(seconds["plain"], share)
        detail = f"{ours:.1f} ms against {theirs:.1f} ms, {len(queries):,} queries"
        bench.add(
            Figure(f"{corpus.name}: {label} against the plain statement, {name}", ours / theirs, "×", limit, detail)
        )
    return found["search"], found["plain"]


def _task(bench: Bench, corpus: Corpus, what: str, total: int = len(OFF_TOPIC)) -> TaskID:
    return bench.progress.add_task(f"{what}: {corpus.name}", total=total)
