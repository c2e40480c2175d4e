"""Take over the vectors of another tool's table.

That is pgai's store, or any table of texts and vectors.

The table is read with the caller's rights. A vector belongs to a chunk of ours if the text is the same, but for white space
around it; keys do not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from psycopg import sql

from embedline.chunking.chunk import content_digest
from embedline.client.connection import Connection
from embedline.client.transfer.lending import batch_rows, send_form
from embedline.client.transfer.recipe import VersionRecipe
from embedline.core.vectors import FloatMatrix, find_faults, normalise, vectors_from_send
from embedline.errors import DimensionMismatch, InvalidParameter, InvalidVectors, NotFound

# Types of a vector column. pgvector's cross in binary form, arrays as lists.
_VECTOR_TYPES = ("vector", "halfvec")
_ARRAY_TYPES = ("real[]", "double precision[]")
_COLUMN = """
    SELECT t.typname, format_type(a.atttypid, NULL), a.atttypmod, a.attrelid::regclass::text
    FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = to_regclass(%s) AND a.attname = %s AND a.attnum > 0 AND NOT a.attisdropped
"""
_EXISTS = "SELECT to_regclass(%s) IS NOT NULL"
_CHECK = """
    SELECT compared, of_another_model, lowest_cosine, required_cosine FROM embedline.check_vectors(%s, %s, %s, %s::bytea[])
"""
_SAMPLE_CHUNKS = "SELECT chunk FROM embedline.sample_chunks(%s, %s)"
# Rows of the source whose chunks a trial compares.
_TRIAL_ROWS = 1000


class VectorsOfAnotherModel(InvalidVectors):
    """The vectors are not those of the model."""


@dataclass
class ForeignTable:
    """A table with a column of texts and one of vectors."""

    connection: Connection
    recipe: VersionRecipe
    name: str
    chunk: str
    embedding: str
    kind: str
    skipped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def find(
        cls, connection: Connection, recipe: VersionRecipe, table: str, chunk: str, embedding: str
    ) -> ForeignTable:
        """Return the table.

        Raises NotFound, InvalidParameter or DimensionMismatch if it has no such columns.
        """
        there = connection.execute(_EXISTS, (table,)).fetchone()
        if not there or not there[0]:
            raise NotFound(f'there is no table "{table}"')
        columns = [connection.execute(_COLUMN, (table, name)).fetchone() for name in (chunk, embedding)]
        for name, option, row in ((chunk, "--chunk", columns[0]), (embedding, "--embedding", columns[1])):
            if row is None:
                raise NotFound(f'{table} has no column "{name}"', hint=f"{option} names it.")
        type_name, shown, dimensions, relation = columns[1] or ("", "", -1, "")
        if type_name not in _VECTOR_TYPES and shown not in _ARRAY_TYPES:
            raise InvalidParameter(
                f'column "{embedding}" of {table} has type {shown}',
                hint=f"It must be one of {', '.join(_VECTOR_TYPES + _ARRAY_TYPES)}.",
            )
        if type_name in _VECTOR_TYPES and dimensions not in (-1, recipe.dimensions):
            raise _other_width(table, dimensions, recipe)
        if recipe.document_prefix_expression is not None:
            raise InvalidParameter(
                f'pipeline "{recipe.pipeline}" embeds a prefix with each chunk, and {table} does not tell what its texts'
                " were embedded with",
                hint="Adopt into a pipeline without document_prefix.",
            )
        return cls(connection, recipe, relation, chunk, embedding, type_name if type_name in _VECTOR_TYPES else "array")

    def row_count(self) -> int:
        """Return the number of rows that the caller may read."""
        row = self.connection.execute(sql.SQL("SELECT count(*) FROM {}").format(self._relation)).fetchone()
        return int(row[0]) if row else 0

    def batches(self) -> Iterator[tuple[list[bytes], FloatMatrix]]:
        """Yield hashes and vectors of usable rows; count the others in `skipped`.

        A transaction must be open.
        """
        size = batch_rows(self.recipe.dimensions)
        with self.connection.cursor(name="embedline_adopt", binary=True) as cursor:
            cursor.execute(self._query(""), binary=True)
            while rows := cursor.fetchmany(size):
                texts, matrix = self._usable(rows)
                yield [content_digest(text.strip()) for text in texts], matrix

    def sample(self, rows: int) -> tuple[list[str], FloatMatrix]:
        """Return texts and vectors of random rows."""
        query = self._query(f"WHERE {{chunk}} IS NOT NULL AND {{embedding}} IS NOT NULL ORDER BY random() LIMIT {rows}")
        found = self.connection.cursor(binary=True).execute(query, binary=True).fetchall()
        before = self.skipped.copy()
        texts, matrix = self._usable(found)
        self.skipped = before
        return texts, matrix

    def check(self, sample: int) -> dict[str, Any]:
        """Compare a sample with what the model makes of its texts now.

        The result says how many of the vectors are another model's.
        """
        texts, matrix = self.sample(sample)
        if not texts:
            raise InvalidParameter(
                f"{self.name} has no row with a text and a usable vector", detail=self.told_skipped()
            )
        row = self.connection.execute(
            _CHECK, (self.recipe.pipeline, self.recipe.version, texts, send_form(matrix, self.recipe.column_type)),
            binary=True,
        ).fetchone()  # fmt: skip
        assert row is not None
        return dict(zip(("compared", "of_another_model", "lowest_cosine", "required_cosine"), row, strict=True))

    def require_model(self, checked: dict[str, Any]) -> None:
        """Raise VectorsOfAnotherModel unless all of the sample are the model's."""
        if checked["of_another_model"]:
            raise VectorsOfAnotherModel(
                f"{checked['of_another_model']} of {checked['compared']} sampled vectors of {self.name} are not what model"
                f' "{self.recipe.model_name}" makes of their texts',
                detail=f"The lowest cosine is {checked['lowest_cosine']:.3f}; that of one model is at least"
                f" {checked['required_cosine']:.2f}. Another model made them, or their texts were embedded with a title or a"
                " prefix.",
                hint="Name the right model; or take them all the same with --force.",
            )

    def trial(self) -> tuple[int, int]:
        """Cut a sample of the source; return how many chunks find a vector.

        The second number is that of all chunks of the sample. A transaction must be open.
        """
        ours = self.connection.execute(_SAMPLE_CHUNKS, (self.recipe.pipeline, _TRIAL_ROWS)).fetchall()
        wanted = Counter(content_digest(chunk.strip()) for (chunk,) in ours)
        found: set[bytes] = set()
        for hashes, _ in self.batches():
            found.update(digest for digest in hashes if digest in wanted)
        return sum(wanted[digest] for digest in found), wanted.total()

    def told_skipped(self) -> str | None:
        """Return in words which rows cannot be used."""
        return "; ".join(f"{count:,} rows: {reason}" for reason, count in self.skipped.items()) or None

    @property
    def _relation(self) -> sql.SQL:
        # As PostgreSQL writes it, quoted where that is needed.
        return sql.SQL(self.name)

    def _query(self, condition: str) -> sql.Composed:
        chunk, embedding = sql.Identifier(self.chunk), sql.Identifier(self.embedding)
        rest = sql.SQL(condition).format(chunk=chunk, embedding=embedding)
        return sql.SQL("SELECT {}::text, {} FROM {} {}").format(chunk, embedding, self._relation, rest)

    def _usable(self, rows: Sequence[tuple[str | None, Any]]) -> tuple[list[str], FloatMatrix]:
        """Return the texts and vectors that can be stored, in the version's form."""
        recipe, kept = self.recipe, []
        for text, vector in rows:
            if text is None or not text.strip():
                self.skipped["the text is empty"] += 1
            elif vector is None:
                self.skipped["the vector is NULL"] += 1
            else:
                kept.append((text, vector))
        if not kept:
            return [], np.zeros((0, recipe.dimensions), dtype=np.float32)
        texts, found = [text for text, _ in kept], [vector for _, vector in kept]
        widths = {self._width(vector) for vector in found} - {recipe.dimensions}
        if widths:
            raise _other_width(self.name, widths.pop(), recipe)
        if self.kind == "array":
            matrix = np.array(found, dtype=np.float32)
        else:
            matrix = vectors_from_send([bytes(vector) for vector in found], self.kind)
        if recipe.distance != "l2":
            return self._unit(texts, matrix)
        faults = find_faults(matrix, recipe.column_type)
        return self._without(faults, texts, matrix)

    def _unit(self, texts: list[str], matrix: FloatMatrix) -> tuple[list[str], FloatMatrix]:
        """Return the vectors of norm 1; the version's distance asks for them."""
        texts, matrix = self._without(find_faults(matrix, "vector"), texts, matrix)
        return texts, normalise(matrix) if len(texts) else matrix

    def _without(self, faults: dict[int, str], texts: list[str], matrix: FloatMatrix) -> tuple[list[str], FloatMatrix]:
        self.skipped.update(faults.values())
        kept = [i for i in range(len(texts)) if i not in faults]
        return [texts[i] for i in kept], matrix[kept]

    def _width(self, vector: Any) -> int:
        return len(vector) if self.kind == "array" else int.from_bytes(bytes(vector)[:2], "big")


def _other_width(table: str, width: int, recipe: VersionRecipe) -> DimensionMismatch:
    return DimensionMismatch(
        f'the vectors of {table} have {width} dimensions, model "{recipe.model_name}" has {recipe.dimensions}',
        hint="Name the model that made them.",
    )
