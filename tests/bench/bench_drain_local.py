"""A local model through the whole pipeline, against `SentenceTransformer.encode` on the same texts in a bare process.

Ours is `CALL embedline.run_worker(until_idle => true)` on rows of one chunk each, with the model in the model host. The
bare process holds the same model in the same backend with the same number of threads, and gets all texts at once. The
texts are pieces of the PostgreSQL manual. The int8 model runs through the same pipeline as the float32 one.
"""

from __future__ import annotations

import html
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from harness import Bench, Figure, scalar, timed

from embedline.core.text import repair_text

MANUAL = Path("/usr/share/doc")
ROWS, CHARACTERS = 400, 900
SHARE, RATIO, COSINE = 0.9, 1.5, 0.98
MODELS = {"minilm-torch": '{"backend": "torch"}', "minilm-int8": '{"backend": "onnx", "precision": "int8"}'}

# Reads batch sizes, encodes all texts each time, answers with the seconds; the last vectors stay in a file.
BARE = """
import json, os, sys, time
import numpy as np, torch
from sentence_transformers import SentenceTransformer
directory, texts, vectors = sys.argv[1:]
texts = json.load(open(texts))
torch.set_num_threads(len(os.sched_getaffinity(0)))
model = SentenceTransformer(directory, device="cpu", model_kwargs={"dtype": "float32"})
model.encode(texts[:8])
for line in sys.stdin:
    start = time.perf_counter()
    matrix = model.encode(texts, batch_size=int(line), show_progress_bar=False)
    seconds = time.perf_counter() - start
    np.save(vectors, matrix)
    print(seconds, flush=True)
"""
COSINES = """
    SELECT avg(1 - (a.embedding <=> b.embedding)), min(1 - (a.embedding <=> b.embedding)), count(*)
    FROM bench_float32_embedding AS a JOIN bench_int8_embedding AS b USING (id)
"""


def run(bench: Bench) -> None:
    """Measure the four sides in turn, in `bench.rounds` rounds after one that warms up."""
    texts = _texts()
    published = bench.models / "all-MiniLM-L6-v2"
    with bench.connect() as session, _bare(published, texts) as (encode, vectors):
        for name, options in MODELS.items():
            create = "SELECT embedline.create_model(%s, 'sentence-transformers', %s, options => %s)"
            scalar(session, create, (name, str(published), options))
        _fill(session, texts)
        sides: dict[str, Callable[[], float]] = {
            "float32": lambda: _drain(session, "bench_float32", "minilm-torch"),
            "encode": lambda: encode(32),
            "encode in fours": lambda: encode(4),
            "int8": lambda: _drain(session, "bench_int8", "minilm-int8"),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        task = bench.progress.add_task("Draining", total=(bench.rounds + 1) * len(sides))
        for number in range(bench.rounds + 1):
            for side, measure in list(sides.items())[:: 1 if number % 2 else -1]:
                bench.progress.update(task, advance=1, description=side)
                elapsed = measure()
                if number > 0:
                    seconds[side].append(elapsed)
        _check_vectors(session, np.load(vectors))
        mean, least, count = session.execute(COSINES).fetchone() or ()
    if count != ROWS:
        raise SystemExit(f"{count} rows have both vectors, not {ROWS}")
    _report(bench, seconds, mean, least)


def _report(bench: Bench, seconds: dict[str, list[float]], mean: float, least: float) -> None:
    rates = {side: ROWS / statistics.median(measured) for side, measured in seconds.items()}
    for label, ours, theirs, target in (
        ("share of SentenceTransformer.encode", "float32", "encode", SHARE),
        ("share of it with batch_size=4", "float32", "encode in fours", None),
        ("int8 ONNX against float32 torch", "int8", "float32", RATIO),
    ):
        pairs = sorted(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))
        detail = f"{rates[ours]:.1f} against {rates[theirs]:.1f} rows/s; rounds {pairs[0]:.2f} to {pairs[-1]:.2f}"
        bench.add(Figure(label, rates[ours] / rates[theirs], "×", target, detail, at_least=target is not None))
    detail = f"{mean:.4f}; least of {ROWS} rows {least:.4f}"
    bench.add(Figure("  mean cosine of int8 to float32", mean, "×", COSINE, detail, at_least=True))


def _texts() -> list[str]:
    """Return pieces of the manual, up to 900 characters each and ending with a word; the same ones every time."""
    found: list[str] = []
    for page in sorted(MANUAL.glob("postgresql-doc-*/html/*.html")):
        body = re.sub(r"(?s)<head>.*?</head>", "", page.read_text(errors="replace"))
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())
        found += [text[start : start + CHARACTERS].rpartition(" ")[0] for start in range(0, len(text), CHARACTERS)]
    # What the pipeline would repair before it embeds is left out: both sides must see the same texts.
    found = sorted({text for text in found if len(text) > CHARACTERS // 2 and repair_text(text) == text})
    if len(found) < ROWS:
        raise SystemExit(f"the manual has {len(found)} pieces here, {ROWS} are needed; is postgresql-doc installed?")
    return random.Random(ROWS).sample(found, ROWS)


@contextmanager
def _bare(model: Path, texts: list[str]) -> Iterator[tuple[Callable[[int], float], Path]]:
    """Start the bare process; yield what makes it encode in batches of a size, and the file of its last vectors."""
    with tempfile.TemporaryDirectory() as folder:
        given, vectors = Path(folder) / "texts.json", Path(folder) / "vectors.npy"
        given.write_text(json.dumps(texts))
        command = [sys.executable, "-c", BARE, str(model), str(given), str(vectors)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None

            def encode(batch_size: int) -> float:
                print(batch_size, file=process.stdin, flush=True)
                return float(process.stdout.readline())

            yield encode, vectors
            process.stdin.close()


def _fill(session: psycopg.Connection[Any], texts: list[str]) -> None:
    session.execute("CREATE TABLE bench_source (id bigint PRIMARY KEY, body text NOT NULL)")
    with session.cursor().copy("COPY bench_source (id, body) FROM STDIN") as copy:
        for number, text in enumerate(texts):
            copy.write_row((number, text))


def _drain(session: psycopg.Connection[Any], pipeline: str, model: str) -> float:
    if scalar(session, "SELECT count(*) FROM embedline.pipeline WHERE name = %s", (pipeline,)):
        session.execute("SELECT embedline.drop_pipeline(%s)", (pipeline,))
    session.execute(
        "SELECT embedline.create_pipeline(%s, 'bench_source', 'body', %s, chunking => 'none', index_method => 'none')",
        (pipeline, model),
    )
    call = "CALL embedline.run_worker(pipeline_name => %s, until_idle => true)"
    elapsed = timed(lambda: session.execute(call, (pipeline,)))
    stored = scalar(session, f"SELECT count(*) FROM {pipeline}_embedding WHERE embedding IS NOT NULL")
    if stored != ROWS:
        raise SystemExit(f"{pipeline}: {stored} rows embedded, not {ROWS}")
    return elapsed


def _check_vectors(session: psycopg.Connection[Any], wanted: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """The pipeline's vectors must be those of the bare process."""
    rows = session.execute("SELECT embedding::real[] FROM bench_float32_embedding ORDER BY id").fetchall()
    stored = np.array([row[0] for row in rows])
    cosines = np.einsum("ij,ij->i", stored, wanted) / np.linalg.norm(stored, axis=1) / np.linalg.norm(wanted, axis=1)
    if cosines.min() < 0.9999:
        raise SystemExit(f"a stored vector is not that of its text: cosine {cosines.min():.4f}")
