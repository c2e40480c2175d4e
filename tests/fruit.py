"""Fruit in English, queries in a made-up language, and a model that knows neither.

A word of the queries stands for a word of the rows. So a query that is held out is made of words that others teach.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from embedline.client.training.request import Request
from embedline.core.query_hash import query_hash
from support import create_pipeline, drain, scalar

_COLOURS = ("red", "green", "blue", "yellow", "black", "white", "brown", "purple", "orange", "silver")
_FRUIT = ("apple", "pear", "plum", "cherry", "grape", "melon", "lemon", "fig", "peach", "mango")
_THEIR_COLOURS = ("zab", "kru", "mel", "tov", "gix", "pon", "dul", "wem", "hys", "rak")
_THEIR_FRUIT = ("osta", "brill", "quen", "fallo", "jurd", "nibe", "vost", "lamp", "cheg", "drim")
DIMENSIONS = 32
MODEL = "fruit-base"
# Twenty steps, of which each second leaves a checkpoint.
REQUEST = Request(
    pipeline="fruit", base=MODEL, pairs="pair", name="fruit-1", seed=1, epochs=10, learning_rate=0.1, batch_size=35,
    negatives=2, held_out=0.3, corpus=50_000, device="cpu", output=None, model_path=None, restart=False,
)  # fmt: skip


@functools.cache
def fruit_model(seed: int = 0) -> Path:
    """Return a static model with random vectors, which the server's user can read."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    folder = Path(tempfile.gettempdir()) / f"embedline-fruit-{seed}"
    if (folder / "modules.json").exists():
        return folder
    building = Path(tempfile.mkdtemp(prefix="embedline-fruit-"))
    words = ["[UNK]", *_COLOURS, *_FRUIT, *_THEIR_COLOURS, *_THEIR_FRUIT, "a", "in", "basket"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(building / "tokenizer.json"))
    table = np.random.default_rng(seed).normal(size=(len(words), DIMENSIONS)).astype(np.float32)
    save_file({"embedding.weight": table}, building / "model.safetensors")
    kind = "sentence_transformers.sentence_transformer.modules.static_embedding.StaticEmbedding"
    (building / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    for path in (building, *building.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    try:
        building.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(building)
    return folder


def register_fruit(connection: psycopg.Connection, name: str, seed: int = 0) -> str:
    """Register a model of that name and return the name."""
    query = "SELECT embedline.create_model(%s, 'sentence-transformers', %s)"
    return str(scalar(connection, query, (name, str(fruit_model(seed)))))


def create_fruit(connection: psycopg.Connection, **options: Any) -> str:
    """Create 100 rows, their queries in table pair, and the pipeline; return the model."""
    model = register_fruit(connection, MODEL)
    connection.execute("CREATE TABLE fruit (id text PRIMARY KEY, body text NOT NULL)")
    connection.execute("CREATE TABLE pair (query text, key text, grade numeric DEFAULT 1, source text, at timestamptz)")
    places = [(c, f) for c in range(len(_COLOURS)) for f in range(len(_FRUIT))]
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO fruit VALUES (%s, %s)", [(f"{c}-{f}", f"{_COLOURS[c]} {_FRUIT[f]}") for c, f in places]
        )
        cursor.executemany(
            "INSERT INTO pair (query, key, source) VALUES (%s, %s, 'expert')",
            [(f"{_THEIR_COLOURS[c]} {_THEIR_FRUIT[f]}", f"{c}-{f}") for c, f in places],
        )
    create_pipeline(connection, "fruit", "fruit", "body", model, **({"keyword": "english"} | options))
    drain(connection)
    return model


@contextlib.contextmanager
def place_to_train() -> Iterator[Path]:
    """Give a folder that the server's user can read, and one core to train on.

    The threads of a small training wait for each other: beside other tests it takes five times as long on two cores.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with tempfile.TemporaryDirectory(prefix="embedline-training-") as folder:
            Path(folder).chmod(0o755)
            yield Path(folder)
    finally:
        os.sched_setaffinity(0, cores)


def silent(step: str, done: int, total: int) -> None:
    """Tell nothing of a step."""


def record(
    connection: psycopg.Connection, model: str, queries: list[str], *, held_out: list[str] | None = None
) -> None:
    """Note that a model was trained on these queries, as embedline finetune does."""
    rows = [
        {"query": query, "key": "0-0", "grade": 1, "is_held_out": query in (held_out or [])}
        for query in [*queries, *(held_out or [])]
    ]
    facts = {
        "base": "base", "base_model": "nowhere", "base_fingerprint": "none", "pipeline": "fruit", "pairs_table": "pair",
        "pairs_hash": query_hash("".join(queries)), "parameters": {}, "seed": 0, "code_version": "1", "evidence": {},
        "metrics": {}, "outcome": "gain",
    }  # fmt: skip
    scalar(connection, "SELECT embedline._record_training(%s, %s, %s)", (model, json.dumps(facts), json.dumps(rows)))
