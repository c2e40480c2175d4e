"""What the database tests share: installing, draining, waiting, and the oracle that says what must be stored."""

from __future__ import annotations

import functools
import hashlib
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import psycopg
from alembic import command
from alembic.config import Config
from psycopg import sql

from embedline.chunking import Chunk, ChunkingSpec
from embedline.chunking.chunk import Chunker
from embedline.chunking.factory import make_chunker
from embedline.core import names
from embedline.core.text import repair_text
from embedline.errors import UnusableText
from generated_names import Generated

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / ".models"

PAGE = "CREATE TABLE page (id integer PRIMARY KEY, title text, body text, views integer NOT NULL DEFAULT 0)"
CONTENT = "title || E'\\n\\n' || body"

# Keeps the planner from ranking few rows exactly. A plan that was switched off costs 10^10, so PostgreSQL would compile each
# statement of the session: 2 s of CPU for an embed_pending of 0.15 s.
TO_THE_INDEX = "SET enable_seqscan = off; SET enable_sort = off; SET jit = off"
AS_THE_PLANNER_LIKES = "RESET enable_seqscan; RESET enable_sort; RESET jit"

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]


def uri(host: str, port: int | str, user: str, password: str | None, dbname: str) -> str:
    """Return a connection URI."""
    login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    return f"postgresql://{login}@{host}:{port}/{quote(dbname, safe='')}"


def alembic_config(dsn: str) -> Config:
    """Return Alembic's configuration for a database."""
    config = Config(str(ROOT / "alembic.ini"))
    config.set_main_option("sqlalchemy.url", dsn.replace("%", "%%"))
    return config


def install(dsn: str, models: Sequence[str] = ("static-256", "minilm")) -> None:
    """Bring a database to head and register the local models."""
    command.upgrade(alembic_config(dsn), "head")
    with psycopg.connect(dsn, autocommit=True) as connection:
        for name in models:
            connection.execute(
                "SELECT embedline.create_model(%s, 'sentence-transformers', %s)", (name, str(MODELS / name))
            )


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float = 20.0, what: str = "the condition holds") -> None:
    """Return once the condition is true; fail after `seconds`."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds:.0f} s in vain until {what}"
        time.sleep(0.01)


def scalar(connection: psycopg.Connection, query: str, parameters: Sequence[Any] = ()) -> Any:
    """Return the first column of a query's only row."""
    row = connection.execute(query, parameters or None).fetchone()
    assert row is not None
    return row[0]


def create_pages(connection: psycopg.Connection, count: int, table: str = "page") -> None:
    """Create table page (id, title, body, views) with `count` rows of different words."""
    connection.execute(PAGE.replace("TABLE page", f"TABLE {table}"))
    connection.execute(
        f"INSERT INTO {table} (id, title, body) SELECT n, 'Title ' || n, 'Body number ' || n || ' about ' || "
        "(ARRAY['rivers', 'mountains', 'databases', 'violins', 'bread', 'rockets', 'law'])[1 + mod(n, 7)] "
        "FROM generate_series(1, %s) AS n",
        (count,),
    )


def create_pipeline(
    connection: psycopg.Connection,
    name: str = "page",
    source: str = "page",
    content: str = CONTENT,
    model: str = "static-256",
    **options: Any,
) -> str:
    """Call embedline.create_pipeline with the defaults of these tests; return the routing view."""
    named = "".join(f", {option} => %s" for option in options)
    query = f"SELECT embedline.create_pipeline(%s, %s::regclass, %s, %s{named})"
    return str(scalar(connection, query, (name, source, content, model, *options.values())))


def drain(connection: psycopg.Connection, pipeline: str | None = None, max_rows: int = 1000) -> int:
    """Call embed_pending until it has nothing more to do; return the number of rows embedded."""
    total = 0
    while embedded := scalar(connection, "SELECT embedline.embed_pending(%s, %s)", (max_rows, pipeline)):
        total += int(embedded)
    return total


def settle(connection: psycopg.Connection, seconds: float = 20.0) -> None:
    """Drain until nothing waits in any pipeline and every backfill is complete."""

    def settled() -> bool:
        drain(connection)
        query = (
            "SELECT coalesce(sum(pending), 0) = 0 AND coalesce(bool_and(backfill_complete), true) FROM embedline.status"
        )
        return bool(scalar(connection, query))

    wait_until(settled, seconds, "every pipeline is drained")


def searching(
    connection: psycopg.Connection, pipeline: str, text: str, k: int = 10, **options: Any
) -> list[tuple[str, str, float]]:
    """Return embedline.search's rows: key, chunk, score."""
    named = "".join(f", {option} => %s" for option in options)
    query = f"SELECT key, chunk, score FROM embedline.search(%s, %s, %s{named})"
    return connection.execute(query, (pipeline, text, k, *options.values())).fetchall()


def data_count(connection: psycopg.Connection, suffix: str, pipeline: str = "page") -> int:
    """Return the number of rows of a generated table, such as the outbox of pipeline page."""
    query = sql.SQL("SELECT count(*) FROM {}").format(Generated(pipeline).identifier(suffix))
    return int(connection.execute(query).fetchone()[0])


def queued(connection: psycopg.Connection, pipeline: str = "page") -> int:
    """Return the number of changes that wait in a pipeline or are in work."""
    return int(scalar(connection, "SELECT pending FROM embedline.status WHERE pipeline = %s", (pipeline,)))


def take_inbox(connection: psycopg.Connection, pipeline: str = "page", key: str = "key_id") -> None:
    """Move what applications appended to the outbox, as a worker's claim does first."""
    connection.execute(
        sql.SQL(
            "WITH taken AS (DELETE FROM {inbox} RETURNING {key})"
            " INSERT INTO {outbox} ({key}) SELECT unnest(taken.{key}) FROM taken"
        ).format(
            inbox=Generated(pipeline).identifier("inbox"),
            outbox=Generated(pipeline).identifier("outbox"),
            key=sql.Identifier(key),
        )
    )


def chunked_keys(connection: psycopg.Connection, pipeline: str = "page") -> set[Any]:
    """Return the keys (first column) that have chunks."""
    query = "SELECT key_columns[1] FROM embedline.pipeline WHERE name = %s"
    column = str(scalar(connection, query, (pipeline,)))
    found = sql.SQL("SELECT DISTINCT {} FROM {}").format(
        sql.Identifier(column), Generated(pipeline).identifier("chunk")
    )
    return {row[0] for row in connection.execute(found)}


@functools.cache
def _static_model() -> tuple[Any, npt.NDArray[np.float32]]:
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = MODELS / "static-256"
    (table,) = load_file(folder / "model.safetensors").values()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer, table.astype(np.float32)


def embed_static(texts: Sequence[str], dimensions: int = 256) -> npt.NDArray[np.float32]:
    """Return static-256's vectors, made without Embedline: the mean of the tokens' rows in the model's table.

    Those of the models that small_models.py makes of it are their first `dimensions`.
    """
    tokenizer, table = _static_model()
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.stack([table[encoding.ids, :dimensions].mean(axis=0) for encoding in encoded])


@dataclass(frozen=True)
class _Recipe:
    source: str
    keys: tuple[str, ...]
    key_names: tuple[str, ...]
    content: str
    filter: str | None
    search_path: str
    prefix: str | None
    chunking: str
    chunk_tokens: int | None
    chunk_overlap: int
    chunking_options: dict[str, float]
    number: int
    normalised: bool
    model: str
    tokenizer: str | None
    document_prefix: str
    chunk_set: int
    pipeline: str

    @property
    def generated(self) -> Generated:
        return Generated(self.pipeline)


def _recipe(connection: psycopg.Connection, pipeline: str, version: int | None) -> _Recipe:
    row = connection.execute(
        """
        SELECT p.source::oid::regclass::text,
            (SELECT array_agg(a.attname::text ORDER BY k.position)
             FROM unnest(p.key_attributes) WITH ORDINALITY AS k (attnum, position)
             JOIN pg_attribute AS a ON a.attrelid = p.source AND a.attnum = k.attnum),
            p.key_columns, p.content_expression, p.filter_expression, p.expression_search_path,
            p.document_prefix_expression, s.chunking, s.chunk_tokens, s.chunk_overlap, s.chunking_options,
            v.number, v.distance <> 'l2', m.name, s.tokenizer, m.document_prefix,
            s.number, p.name
        FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
            AND coalesce(v.number = %s, v.version_id = p.serving_version_id)
        JOIN embedline.chunk_set AS s ON s.pipeline_id = p.pipeline_id AND s.number = v.chunk_set
        JOIN embedline.model AS m USING (model_id) WHERE p.name = %s
        """,
        (version, pipeline),
    ).fetchone()
    assert row is not None, f"there is no pipeline {pipeline}, or no such version"
    source, keys, names, *rest = row
    return _Recipe(source, tuple(keys), tuple(names), *rest)


@functools.cache
def _fixed_chunker(spec: ChunkingSpec, tokenizer: str | None) -> Chunker:
    return make_chunker(spec, tokenizer, None)


def _chunker(recipe: _Recipe, embed: Embed) -> Chunker:
    options = tuple(sorted(recipe.chunking_options.items()))
    spec = ChunkingSpec(recipe.chunking, recipe.chunk_tokens, recipe.chunk_overlap, options)
    if recipe.chunking != "semantic":
        return _fixed_chunker(spec, recipe.tokenizer)
    return make_chunker(
        spec, recipe.tokenizer, lambda texts, _: embed([recipe.document_prefix + text for text in texts])
    )


def _expected_chunks(chunker: Chunker, content: str | None, prefix: str | None) -> list[Chunk] | None:
    """Return the chunks of a row; None where the content must have become a dead letter."""
    if content is None:
        return []
    try:
        text = repair_text(content)
    except UnusableText:
        return None
    return chunker(text, prefix=prefix or "")


def assert_exact(
    connection: psycopg.Connection,
    pipeline: str = "page",
    *,
    content: str | None = None,
    filter: str | None = None,
    embed: Embed | None = None,
    version: int | None = None,
) -> int:
    """Assert that a drained pipeline holds exactly what its source asks for; return the number of chunks.

    Nothing is queued; every row that the filter accepts has the chunks of its current content and no others; each chunk
    has one vector, the one that the model gives for its text; there is nothing besides. `content` and `filter` replace
    the expressions of the catalogue, for sources whose columns were renamed. `embed` computes vectors of other models.
    Without a `version` it is the serving one that is looked at.
    """
    recipe = _recipe(connection, pipeline, version)
    assert queued(connection, pipeline) == 0, "changes are still queued"
    if embed is None:
        family, _, dimensions = recipe.model.partition("-")
        assert family == "static", "pass embed for this model"
        embed = functools.partial(embed_static, dimensions=int(dimensions))
    rows = _source_rows(connection, recipe, content or recipe.content, filter or recipe.filter)
    stored = _stored_chunks(connection, recipe)
    states = _stored_states(connection, pipeline, recipe)
    chunker = _chunker(recipe, embed)
    expected = {key: _expected_chunks(chunker, text, prefix) for key, (text, prefix) in rows.items()}
    wanted = {key: found for key, found in expected.items() if found}
    actual = {key: [chunk for chunk, _ in found] for key, found in stored.items()}
    assert actual.keys() == wanted.keys(), f"chunks of other keys: {sorted(actual.keys() ^ wanted.keys())[:5]}"
    for key, found in wanted.items():
        assert actual[key] == found, f"chunks of {key} are not those of its content"
    names = {True: "embedded", False: "empty"}
    assert states == {
        key: "dead" if found is None else names[rows[key][0] is not None] for key, found in expected.items()
    }, "document states differ"
    _assert_dead_letters(connection, pipeline, {key for key, found in expected.items() if found is None})
    _assert_vectors(connection, recipe, [pair for found in stored.values() for pair in found], embed)
    return sum(map(len, stored.values()))


def _source_rows(
    connection: psycopg.Connection, recipe: _Recipe, content: str, filter: str | None
) -> dict[tuple[str, ...], tuple[str | None, str | None]]:
    with connection.transaction():
        connection.execute("SELECT set_config('search_path', %s, true)", (recipe.search_path,))
        keys = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(key)) for key in recipe.keys)
        statement = sql.SQL("SELECT ARRAY[{}], ({})::text, ({})::text FROM {} WHERE ({})::boolean").format(
            keys, sql.SQL(content), sql.SQL(recipe.prefix or "NULL"), sql.SQL(recipe.source), sql.SQL(filter or "true")
        )
        return {tuple(key): (text, prefix) for key, text, prefix in connection.execute(statement)}


def _stored_chunks(
    connection: psycopg.Connection, recipe: _Recipe
) -> dict[tuple[str, ...], list[tuple[Chunk, list[float]]]]:
    keys = sql.SQL(", ").join(sql.SQL("c.{}::text").format(sql.Identifier(key)) for key in recipe.key_names)
    statement = sql.SQL(
        "SELECT ARRAY[{}], c.seq, c.start_offset, c.end_offset, c.content, c.content_hash, c.prefix, v.{}::vector::real[]"
        " FROM {} AS c LEFT JOIN {} AS v USING (chunk_id) ORDER BY c.seq"
    ).format(
        keys,
        sql.Identifier(names.vector_column(recipe.number)),
        recipe.generated.identifier(names.chunk_suffix(recipe.chunk_set)),
        recipe.generated.identifier(names.version_suffix(recipe.number)),
    )
    found: dict[tuple[str, ...], list[tuple[Chunk, list[float]]]] = {}
    for key, sequence, start, end, text, digest, prefix, vector in connection.execute(statement):
        assert vector is not None, f"chunk {sequence} of {key} has no vector"
        assert prefix != "", "no prefix is NULL"
        hashed = text if prefix is None else f"{prefix}\0{text}"
        assert digest.bytes == hashlib.sha256(hashed.encode()).digest()[:16]
        chunk = Chunk(sequence, start, end, text, digest.bytes, prefix or "")
        found.setdefault(tuple(key), []).append((chunk, vector))
    return found


def _stored_states(connection: psycopg.Connection, pipeline: str, recipe: _Recipe) -> dict[tuple[str, ...], str]:
    keys = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(key)) for key in recipe.key_names)
    statement = sql.SQL("SELECT ARRAY[{}], state FROM {}").format(keys, Generated(pipeline).identifier("document"))
    return {tuple(key): state for key, state in connection.execute(statement)}


def _assert_dead_letters(connection: psycopg.Connection, pipeline: str, keys: set[tuple[str, ...]]) -> None:
    letters = connection.execute(
        "SELECT key FROM embedline.dead_letter JOIN embedline.pipeline USING (pipeline_id) WHERE name = %s", (pipeline,)
    )
    assert sorted(sorted(row[0].values()) for row in letters) == sorted(sorted(key) for key in keys), "dead letters"


def _assert_vectors(
    connection: psycopg.Connection, recipe: _Recipe, found: list[tuple[Chunk, list[float]]], embed: Embed
) -> None:
    assert data_count(connection, names.version_suffix(recipe.number), recipe.pipeline) == len(found), (
        "vectors without a chunk"
    )
    if not found:
        return
    embedded = [chunk.prefix + chunk.content.strip() for chunk, _ in found]
    texts = list(dict.fromkeys(embedded))
    matrix = embed([recipe.document_prefix + text for text in texts]).astype(np.float64)
    wanted = dict(zip(texts, matrix / np.linalg.norm(matrix, axis=1, keepdims=True), strict=True))
    stored = np.array([vector for _, vector in found], dtype=np.float64)
    norms = np.linalg.norm(stored, axis=1)
    cosines = np.einsum("ij,ij->i", stored, np.stack([wanted[text] for text in embedded])) / norms
    assert cosines.min() >= 0.9999, f"a vector is not that of its text: cosine {cosines.min():.4f}"
    if recipe.normalised:
        assert np.abs(norms - 1).max() < 2e-3
