"""Images through the model host, against their encoder alone.

Both sides get the same files and begin with decoding them. The bare side is a script with Pillow and onnxruntime. It decodes
one file after the other, and encodes at the best of its batch sizes. A second one decodes in as many threads as there are
cores, as the host does. Weights are random, because only the time counts.
A small tower reads icons (PNG, 128 pixels), a larger one photos (JPEG, 640 × 480). Then rows are edited while the model has
their photos, and a pipeline of icons is searched by words and by a file.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from harness import Bench, Figure, percentile, scalar, timed
from PIL import Image

from embedline.core.embedding import ModelConfig
from embedline.core.media import MediaPart
from embedline.dev.demo.joint_space import write_graph
from embedline.embedders.local import LocalEmbedder
from generated_names import Generated

LEAST_RATIO, SEARCH_MS, EDIT_MS, MOST_RATIO = 0.9, 40, 100, 1.25
REQUEST_ITEMS, IN_FLIGHT, BATCHES = 64, 4, (8, 32, 64)
PICTURES, QUERIES, WARM_UP, EDITS = 10_000, 200, 10, 50
_MEAN, _STD, _DIMENSIONS = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25], 384
# Decodes and encodes the files of a folder each time it reads a line: the size of a batch, and the number of threads.
BARE = """
import io, json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from PIL import Image, ImageOps
from embedline.model_host.onnx_backend import open_session
folder, graph, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
files = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
session = open_session(graph, "cpu")

def pixels(data):
    image = ImageOps.pad(Image.open(io.BytesIO(data)).convert("RGB"), (size, size), color="white")
    return (np.asarray(image, np.float32) * np.float32(1 / 63.75) - np.float32(2)).transpose(2, 0, 1)

def encode(batch, threads):
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        decoded = list(threads.map(pixels, part)) if threads else [pixels(data) for data in part]
        rows = session.run(None, {"pixels": np.stack(decoded)})[0]
    return rows

for line in sys.stdin:
    batch, count = map(int, line.split())
    threads = ThreadPoolExecutor(count) if count else None
    start = time.perf_counter()
    rows = encode(batch, threads)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, rows[-1][:4].tolist()]), flush=True)
"""


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and the tower that reads them."""

    name: str
    size: tuple[int, int]
    form: str
    count: int
    channels: tuple[int, ...]
    side: int


ICONS = Kind("icons", (128, 128), "PNG", 1000, (32, 64, 128, 192), 48)
PHOTOS = Kind("photos", (640, 480), "JPEG", 200, (32, 64, 128, 256, 512), 224)


def run(bench: Bench) -> None:
    """Measure the host with both kinds, then a pipeline of icons."""
    with tempfile.TemporaryDirectory(prefix="embedline-images-") as name:
        root = Path(name)
        root.chmod(0o755)
        models = {kind.name: _write_model(root, kind, bench.models) for kind in (ICONS, PHOTOS)}
        for kind in (ICONS, PHOTOS):
            _compare(bench, root, kind, models[kind.name])
        with bench.connect() as connection:
            for kind in (ICONS, PHOTOS):
                statement = "SELECT embedline.create_model(%s, 'sentence-transformers', %s)"
                connection.execute(statement, (kind.name, str(models[kind.name])))
            _edit_meanwhile(bench, connection)
            _search(bench, connection)


def files(kind: Kind, count: int) -> Iterator[bytes]:
    """Yield different pictures: waves of three colours with a little noise."""
    rng = np.random.default_rng(7)
    width, height = kind.size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for _ in range(count):
        waves = rng.uniform(0.005, 0.08, (3, 2))
        colours = np.stack([128 + 100 * np.sin(a * x + b * y) for a, b in waves], axis=2)
        noise = rng.normal(0, 4, (height, width, 1)).astype(np.float32)
        file = io.BytesIO()
        Image.fromarray(np.clip(colours + noise, 0, 255).astype(np.uint8)).save(file, kind.form)
        yield file.getvalue()


def _write_model(root: Path, kind: Kind, models: Path) -> Path:
    folder = root / kind.name
    (folder / "image").mkdir(mode=0o755, parents=True)
    rng = np.random.default_rng(1)
    ends = [*zip((3, *kind.channels), kind.channels, strict=False)]
    shapes = [*((after, before, 3, 3) for before, after in ends), (_DIMENSIONS, kind.channels[-1])]
    layers = [
        ((rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), np.zeros(shape[0], np.float32))
        for shape in shapes
    ]
    write_graph(layers, kind.side, folder / "image/model.onnx")
    shutil.copytree(models / "minilm", folder / "text")
    image = {"graph": "image/model.onnx", "size": kind.side, "mean": _MEAN, "std": _STD, "fit": "pad"}
    towers = {"dimensions": _DIMENSIONS, "towers": {"text": {"folder": "text"}, "image": image}}
    (folder / "towers.json").write_text(json.dumps(towers))
    return folder


def _compare(bench: Bench, root: Path, kind: Kind, model: Path) -> None:
    """Send all files through the host and through the bare encoder, in turn."""
    given = list(files(kind, kind.count))
    folder = root / f"{kind.name}-files"
    folder.mkdir()
    for number, data in enumerate(given):
        (folder / f"{number:05}").write_bytes(data)
    cores = len(os.sched_getaffinity(0))
    forms = [(batch, threads) for threads in (0, cores) for batch in BATCHES]
    config = ModelConfig(kind.name, "sentence-transformers", str(model), dimensions=_DIMENSIONS)
    ours: list[float] = []
    theirs: dict[tuple[int, int], list[float]] = {form: [] for form in forms}
    task = bench.progress.add_task(f"The host, {kind.name}", total=(bench.rounds + 1) * (1 + len(forms)))
    with _bare(str(folder), str(model / "image/model.onnx"), str(kind.side)) as bare:
        embedder = LocalEmbedder(config, owner_pid=os.getpid(), runtime_root=str(root))
        for number in range(bench.rounds + 1):
            since = time.perf_counter()
            found = list(_embedded(embedder, given))
            seconds = time.perf_counter() - since
            bench.progress.update(task, advance=1)
            # The first round warms up.
            ours += [seconds] if number else []
            for form in forms:
                spent, last = bare(*form)
                bench.progress.update(task, advance=1)
                theirs[form] += [spent] if number else []
                if not np.allclose(found[-1][-1][:4], last, atol=1e-3):
                    raise SystemExit(f"{kind.name}: the host's last vector is not the bare encoder's")
        embedder.close()
    rate = kind.count / statistics.median(ours)
    detail = f"{kind.form} of {kind.size[0]} × {kind.size[1]}, {statistics.fmean(map(len, given)) / 1000:.0f} kB each"
    bench.add(Figure(f"{kind.name} through the host", rate, "images/s", detail=detail))
    for threads, limit, label in ((0, LEAST_RATIO, "decoding one by one"), (cores, None, f"{cores} decoding threads")):
        best = min((form for form in forms if form[1] == threads), key=lambda form: statistics.median(theirs[form]))
        ratios = sorted(bare_ / own for bare_, own in zip(theirs[best], ours, strict=True))
        bare_rate = kind.count / statistics.median(theirs[best])
        detail = f"bare: {bare_rate:,.0f} images/s in batches of {best[0]}; rounds {ratios[0]:.2f} to {ratios[-1]:.2f}"
        ratio = statistics.median(ratios)
        bench.add(Figure(f"  times the bare encoder, {label}", ratio, "×", limit, detail, at_least=True))


def _embedded(embedder: LocalEmbedder, given: Sequence[bytes]) -> Iterator[np.ndarray]:
    waiting: deque[Any] = deque()

    def rows() -> np.ndarray:
        block = waiting.popleft().result(300)
        return np.frombuffer(block.data, dtype="<f4").reshape(block.count, block.dimensions)

    for start in range(0, len(given), REQUEST_ITEMS):
        if len(waiting) == IN_FLIGHT:
            yield rows()
        parts = [MediaPart("image", data) for data in given[start : start + REQUEST_ITEMS]]
        waiting.append(embedder.submit(parts, "document"))
    while waiting:
        yield rows()


@contextmanager
def _bare(*arguments: str) -> Iterator[Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BARE, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(batch: int, threads: int) -> Any:
            assert process.stdin is not None and process.stdout is not None
            print(batch, threads, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def _create(connection: psycopg.Connection[Any], table: str, kind: Kind, count: int) -> None:
    connection.execute(f"CREATE TABLE {table} (id bigint PRIMARY KEY, name text, picture bytea NOT NULL)")
    with connection.cursor().copy(f"COPY {table} FROM STDIN") as copy:
        for number, data in enumerate(files(kind, count)):
            copy.write_row((number, f"picture {number}", data))
    connection.execute(f"ANALYZE {table}")


def _pipeline(connection: psycopg.Connection[Any], table: str, kind: Kind) -> None:
    connection.execute(
        "SELECT embedline.create_pipeline(%s, %s::regclass, 'picture', %s, modality => 'image', caption => 'name')",
        (table, table, kind.name),
    )


def _edit_meanwhile(bench: Bench, connection: psycopg.Connection[Any]) -> None:
    """Update and delete rows while the model has their photos.

    A plain table gets the same statements in turn.
    """
    for table in ("bench_photo", "bench_plain"):
        _create(connection, table, PHOTOS, PHOTOS.count)
    _pipeline(connection, "bench_photo", PHOTOS)
    scalar(connection, "SELECT embedline.embed_query('bench_photo', 'warm up')")
    begun, done = threading.Event(), threading.Event()

    def embed() -> None:
        with bench.connect() as session:
            begun.set()
            while scalar(session, "SELECT embedline.embed_pending(500, 'bench_photo')"):
                pass
            done.set()

    worker = threading.Thread(target=embed)
    worker.start()
    begun.wait()
    spent: dict[tuple[str, str], list[float]] = {}
    meanwhile = 0
    statements = {
        "UPDATE": "UPDATE {} SET picture = picture || '\\x00' WHERE id = %s",
        "DELETE": "DELETE FROM {} WHERE id = %s",
    }
    for number in range(EDITS):
        for offset, (verb, statement) in enumerate(statements.items()):
            for table in ("bench_photo", "bench_plain"):
                query = statement.format(table)
                key = 2 * number + offset
                spent.setdefault((verb, table), []).append(
                    timed(lambda q=query, k=key: connection.execute(q, (k,))) * 1000
                )
        meanwhile += not done.is_set()
    worker.join()
    while scalar(connection, "SELECT embedline.embed_pending(500, 'bench_photo')"):
        pass
    left = scalar(connection, "SELECT count(*) FROM bench_photo_embedding")
    if left != PHOTOS.count - EDITS:
        raise SystemExit(f"{left} photos are embedded, not {PHOTOS.count - EDITS}")
    for verb in statements:
        ours, plain = spent[verb, "bench_photo"], spent[verb, "bench_plain"]
        detail = (
            f"{meanwhile} of {EDITS} while the model worked; median {statistics.median(ours):.1f} ms;"
            f" plain table: most {max(plain):.1f}, median {statistics.median(plain):.1f} ms"
        )
        bench.add(Figure(f"{verb} of a row whose photo is in flight, most", max(ours), "ms", EDIT_MS, detail))


def _search(bench: Bench, connection: psycopg.Connection[Any]) -> None:
    """Search among 10,000 icons by words and by a file."""
    _create(connection, "bench_icon", ICONS, PICTURES)
    _pipeline(connection, "bench_icon", ICONS)
    task = bench.progress.add_task("Embedding icons", total=PICTURES)

    def embed() -> None:
        while embedded := scalar(connection, "SELECT embedline.embed_pending(1000, 'bench_icon')"):
            bench.progress.update(task, advance=embedded)

    rate = PICTURES / timed(embed)
    bench.add(Figure("icons through a pipeline", rate, "images/s", detail=f"one session, {PICTURES:,} rows"))
    # A text pipeline on the same rows, with the text tower's own model.
    connection.execute("SELECT embedline.create_pipeline('bench_name', 'bench_icon', 'name', 'minilm')")
    while scalar(connection, "SELECT embedline.embed_pending(1000, 'bench_name')"):
        pass
    for pipeline in ("bench_icon", "bench_name"):
        connection.execute(scalar(connection, "SELECT embedline.index_statement(%s)", (pipeline,)))
        for table in ("bench_icon", f"{Generated(pipeline)('chunk')}", f"{Generated(pipeline)('v1')}"):
            connection.execute(f"VACUUM ANALYZE {table}")
    pictures = list(files(ICONS, PICTURES + QUERIES + WARM_UP))[-QUERIES - WARM_UP :]
    words = [f"waves of colour number {number}" for number in range(QUERIES + WARM_UP)]
    kinds = (
        ("by words", "bench_icon", "text", words),
        ("by a picture", "bench_icon", "bytea", pictures),
        # Other words, whose vectors no host knows.
        ("of texts", "bench_name", "text", [f"{text} again" for text in words]),
    )
    times: dict[str, list[float]] = {}
    for number in range(QUERIES + WARM_UP):
        for label, pipeline, cast, queries in kinds:
            statement = f"SELECT key, chunk, score FROM embedline.search(%s, %s::{cast})"
            since = time.perf_counter()
            found = connection.execute(statement, (pipeline, queries[number])).fetchall()
            times.setdefault(label, []).append((time.perf_counter() - since) * 1000)
            if len(found) != 10:
                raise SystemExit(f"{len(found)} results of a search {label}")
    later = {label: each[WARM_UP:] for label, each in times.items()}
    for label, each in later.items():
        detail = f"p50 {statistics.median(each):.1f} ms, slowest {max(each):.1f} ms of {QUERIES}, in turn"
        limit = SEARCH_MS if label != "of texts" else None
        bench.add(Figure(f"search {label}, p95", percentile(each, 0.95), "ms", limit, detail))
    for label in ("by words", "by a picture"):
        ratio = percentile(later[label], 0.95) / percentile(later["of texts"], 0.95)
        medians = statistics.median(later[label]) / statistics.median(later["of texts"])
        bench.add(Figure(f"  {label} over texts, p95", ratio, "×", MOST_RATIO, f"p50 {medians:.2f} ×"))
