"""Read the chunks that queries are ranked over, as the caller may read them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from psycopg import sql

from embedline.client.connection import Connection
from embedline.client.transfer.recipe import VersionRecipe
from embedline.errors import NotReady

_BATCH_ROWS = 10_000
_VECTORS = "SELECT vectors FROM embedline.versions WHERE pipeline = %s AND version = %s"


@dataclass(frozen=True)
class Corpus:
    """Chunks in the order of their rows' keys; `keys` has the key of each."""

    keys: list[str]
    texts: list[str]

    @cached_property
    def documents(self) -> list[str]:
        """Return the keys of the rows, in order."""
        return list(dict.fromkeys(self.keys))

    @cached_property
    def starts(self) -> npt.NDArray[np.intp]:
        """Return the place of each row's first chunk."""
        places = [i for i, key in enumerate(self.keys) if not i or key != self.keys[i - 1]]
        return np.array(places, dtype=np.intp)

    def chunks_of(self, document: int) -> range:
        """Return the places of a row's chunks."""
        end = self.starts[document + 1] if document + 1 < len(self.starts) else len(self.keys)
        return range(int(self.starts[document]), int(end))

    @cached_property
    def hash(self) -> str:
        """Return the SHA-256 (hex) of all keys and texts."""
        digest = hashlib.sha256()
        for key, text in zip(self.keys, self.texts, strict=True):
            digest.update(f"{len(key)} {key} {len(text)} {text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def read_corpus(connection: Connection, recipe: VersionRecipe, wanted: Collection[str], most: int) -> Corpus:
    """Return the chunks of the wanted keys, and of others up to about `most` in all.

    Which others is decided by the hash of their keys, so that a repeated run ranks over the same.
    """
    row = connection.execute(_VECTORS, (recipe.pipeline, recipe.version)).fetchone()
    total = int(row[0]) if row else 0
    share = min(1.0, most / max(total, 1))
    needed = set(wanted)
    found: list[tuple[str, int, str]] = []
    with connection.transaction(), connection.cursor(name="embedline_corpus") as cursor:
        cursor.execute(_query(recipe))
        while rows := cursor.fetchmany(_BATCH_ROWS):
            found += [row for row in rows if share == 1 or row[0] in needed or _drawn(row[0]) < share]
    if not found:
        raise NotReady(
            f'pipeline "{recipe.pipeline}" has no chunks to train on',
            hint="SELECT embed_pending(1000); embeds what waits.",
        )
    found.sort(key=lambda row: (row[0], row[1]))
    return Corpus([row[0] for row in found], [row[2] for row in found])


def _drawn(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _query(recipe: VersionRecipe) -> sql.Composed:
    if recipe.view is None:
        raise NotReady(
            f"version {recipe.version} has no view", hint=f"SELECT embedline.refresh_pipeline('{recipe.pipeline}');"
        )
    names = recipe.view_columns
    keys = sql.SQL(", ").join(sql.SQL("e.{}::text").format(sql.Identifier(name)) for name in recipe.key_names)
    key = keys if len(recipe.key_names) == 1 else sql.SQL("pg_catalog.jsonb_build_array({})::text").format(keys)
    return sql.SQL("SELECT {}, e.{}, e.{} FROM {} AS e").format(
        key, sql.Identifier(names["chunk_seq"]), sql.Identifier(names["chunk"]), sql.SQL(recipe.view)
    )
