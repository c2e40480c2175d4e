"""Write a version's chunks and vectors into a file, as the caller may read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psycopg
from psycopg import sql

import embedline
from embedline.client.connection import Connection
from embedline.client.transfer.files import FORMAT, Batch, form_of, new_file
from embedline.client.transfer.forms import writer_of
from embedline.client.transfer.recipe import VersionRecipe, read_recipe
from embedline.core import names
from embedline.core.vectors import vectors_from_send
from embedline.errors import NotFound, NotReady

# Bytes of the vectors of one batch, and the most rows. A row group of DuckDB has as many.
_BATCH_BYTES, _BATCH_ROWS = 16_000_000, 10_000
_COLUMNS = """
    SELECT a.attname, format_type(a.atttypid, NULL) FROM pg_attribute AS a
    WHERE a.attrelid = %s::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
# Types that a file has itself. All others are text in ISO form.
_PLAIN = ("boolean", "smallint", "integer", "bigint", "real", "double precision")
_VECTORS = "SELECT vectors, missing FROM embedline.versions WHERE pipeline = %s AND version = %s"
# One plan for all rows: a cursor is planned for its first ones otherwise.
_SETTINGS = (
    "SET LOCAL cursor_tuple_fraction = 1", "SET LOCAL jit = off", "SET LOCAL timezone = 'UTC'",
    "SET LOCAL datestyle = 'ISO'", "SET LOCAL intervalstyle = 'iso_8601'", "SET LOCAL bytea_output = 'hex'",
    "SET LOCAL extra_float_digits = 1",
)  # fmt: skip

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Exported:
    """The result of an export; `missing` chunks of the version had no vector."""

    pipeline: str
    version: int
    file: str
    rows: int
    bytes: int
    missing: int
    fingerprint: str


def export(
    connection: Connection,
    pipeline: str,
    version: int | None,
    columns: Sequence[str],
    path: Path,
    progress: Progress,
) -> Exported:
    """Write a version's chunks into a file, all of one snapshot.

    `connection` is in autocommit mode. Raises EmbedlineError, psycopg.Error, OSError.
    """
    form = form_of(path)
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    try:
        with connection.transaction():
            for setting in _SETTINGS:
                connection.execute(setting.encode())
            found = read_recipe(connection, pipeline, version)
            return _export(connection, found, _chosen(connection, found, columns), form, path, progress)
    finally:
        connection.isolation_level = connection.read_only = None


def _chosen(connection: Connection, recipe: VersionRecipe, wanted: Sequence[str]) -> dict[str, str]:
    """Return the chosen columns with their types; `*` chooses all."""
    if recipe.view_oid is None or recipe.view is None:
        raise NotReady(
            f"version {recipe.version} has no view", hint=f"SELECT embedline.refresh_pipeline('{recipe.pipeline}');"
        )
    ours = {
        recipe.view_columns[name]
        for name in ("chunk_id", "chunk_seq", "chunk_start", "chunk_end", "chunk", "embedding")
    }
    there = {
        name: kind for name, kind in connection.execute(_COLUMNS, (recipe.view_oid,)).fetchall() if name not in ours
    }
    names_wanted = list(there) if "*" in wanted else list(dict.fromkeys(wanted))
    for name in names_wanted:
        if name not in there:
            raise NotFound(f'{recipe.source} has no column "{name}"', detail=f"Columns: {', '.join(there)}.")
    return {name: there[name] for name in names_wanted}


def _export(
    connection: Connection, recipe: VersionRecipe, columns: dict[str, str], form: str, path: Path, progress: Progress
) -> Exported:
    counted = connection.execute(_VECTORS, (recipe.pipeline, recipe.version)).fetchone()
    total, missing = (int(counted[0]), int(counted[1])) if counted else (0, 0)
    # The columns of the file have names of their own; one of the source may be called the same.
    shown = {_free(name): name for name in columns}
    metadata = {
        "format": FORMAT,
        "embedline": embedline.__version__,
        "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **recipe.metadata(),
    }
    rows = 0
    with new_file(path) as part:
        writer = writer_of(form, part, metadata, {name: columns[c] for name, c in shown.items()}, recipe.dimensions)
        try:
            for batch in _batches(connection, recipe, columns, shown):
                writer.write(batch)
                rows += len(batch.keys)
                progress(rows, total)
            writer.finish()
        finally:
            writer.close()
    return Exported(
        recipe.pipeline, recipe.version, str(path), rows, path.stat().st_size, missing, recipe.fingerprint
    )  # fmt: skip


def _free(name: str) -> str:
    taken = ("key", "chunk_seq", "chunk_start", "chunk_end", "chunk", "content_hash", "embedding")
    return f"source_{name}" if name in taken else name


def _batches(
    connection: Connection, recipe: VersionRecipe, columns: dict[str, str], shown: dict[str, str]
) -> Iterator[Batch]:
    size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // (4 * recipe.dimensions)))
    with connection.cursor(name="embedline_export", binary=True) as cursor:
        cursor.execute(_query(recipe, columns), binary=True)
        while rows := cursor.fetchmany(size):
            keys, seqs, starts, ends, chunks, hashes, sent, *values = zip(*rows, strict=True)
            yield Batch(
                keys=keys,
                places=list(zip(seqs, starts, ends, strict=True)),
                chunks=chunks,
                hashes=[found.bytes for found in hashes],
                columns=dict(zip(shown, values, strict=True)),
                vectors=vectors_from_send([bytes(vector) for vector in sent], recipe.column_type),
            )


def _query(recipe: VersionRecipe, columns: dict[str, str]) -> sql.Composed:
    """Return the query of all rows.

    It joins the version's view with the hashes of its chunks.
    """
    view = recipe.view_columns
    keys = [sql.SQL("e.{}::text").format(sql.Identifier(name)) for name in recipe.key_names]
    listed = sql.SQL(", ").join(keys)
    key = listed if len(keys) == 1 else sql.SQL("pg_catalog.jsonb_build_array({})::text").format(listed)
    of_chunk = [
        sql.SQL("e.{}").format(sql.Identifier(view[name]))
        for name in ("chunk_seq", "chunk_start", "chunk_end", "chunk")
    ]
    of_source = [
        sql.SQL("e.{}" if kind in _PLAIN else "e.{}::text").format(sql.Identifier(name))
        for name, kind in columns.items()
    ]
    vector = sql.SQL("e.{}").format(sql.Identifier(view["embedding"]))
    return sql.SQL("SELECT {} FROM {} AS e JOIN {}() AS h ON h.chunk_id = e.{}").format(
        sql.SQL(", ").join([key, *of_chunk, sql.SQL("h.content_hash"), vector, *of_source]),
        sql.SQL(recipe.view or ""),
        sql.Identifier("embedline_search", names.of_version(recipe.pipeline, recipe.version, "stored")),
        sql.Identifier(view["chunk_id"]),
    )
