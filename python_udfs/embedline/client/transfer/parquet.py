"""Exported vectors as Parquet, by pyarrow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedline.client.transfer.files import Batch, UnusableFile
from embedline.core.vectors import FloatMatrix
from embedline.errors import InvalidParameter

_METADATA = b"embedline"
# PostgreSQL's types that have one of Arrow's; all others are text.
_TYPES = {
    "boolean": "bool_", "smallint": "int16", "integer": "int32", "bigint": "int64", "real": "float32",
    "double precision": "float64",
}  # fmt: skip


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InvalidParameter(
            "Parquet needs pyarrow, which is not installed",
            hint="pip install 'embedline[export]'; or give the file a name that ends with .npz.",
        ) from None
    return pyarrow


class ParquetWriter:
    """A Parquet file with one row group for each batch."""

    def __init__(self, path: Path, metadata: dict[str, Any], columns: dict[str, str], dimensions: int) -> None:
        """Open the file and write its schema."""
        self._arrow = arrow = _pyarrow()
        self._columns = columns
        self._vector = arrow.list_(arrow.float32(), dimensions)
        fields = [
            ("key", arrow.string()), ("chunk_seq", arrow.int32()), ("chunk_start", arrow.int32()),
            ("chunk_end", arrow.int32()), ("chunk", arrow.string()), ("content_hash", arrow.binary(16)),
            *((name, getattr(arrow, _TYPES.get(kind, "string"))()) for name, kind in columns.items()),
            ("embedding", self._vector),
        ]  # fmt: skip
        self._schema = arrow.schema(fields, metadata={_METADATA: json.dumps(metadata).encode()})
        # Floats do not compress, and a dictionary of them would only take time.
        texts = [name for name, kind in fields if kind == arrow.string()]
        self._file = arrow.parquet.ParquetWriter(
            path, self._schema, compression={name: "zstd" if name in texts else "none" for name, _ in fields},
            use_dictionary=[name for name in columns if name in texts],
        )  # fmt: skip

    def write(self, batch: Batch) -> None:
        """Append rows."""
        arrow = self._arrow
        places = list(zip(*batch.places, strict=True))
        flat = arrow.array(np.ascontiguousarray(batch.vectors).reshape(-1), arrow.float32())
        arrays = [
            arrow.array(batch.keys, arrow.string()), *(arrow.array(place, arrow.int32()) for place in places),
            arrow.array(batch.chunks, arrow.string()), arrow.array(batch.hashes, arrow.binary(16)),
            *(arrow.array(batch.columns[name], self._schema.field(name).type) for name in self._columns),
            arrow.FixedSizeListArray.from_arrays(flat, type=self._vector),
        ]  # fmt: skip
        self._file.write_table(arrow.Table.from_arrays(arrays, schema=self._schema))

    def finish(self) -> None:
        """Write the end of the file."""
        self._file.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ParquetReader:
    """A Parquet file that `export` has written."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its metadata."""
        arrow = _pyarrow()
        # Its own errors for a missing file and for one of another form are alike.
        path.open("rb").close()
        try:
            self._file = arrow.parquet.ParquetFile(path)
            found = (self._file.schema_arrow.metadata or {}).get(_METADATA)
        except (arrow.ArrowException, OSError) as error:
            raise UnusableFile(f"{path} is no Parquet file: {' '.join(str(error).split())}") from None
        if found is None:
            raise UnusableFile(
                f"{path} was not written by embedline export", hint="embedline adopt takes vectors of a table."
            )
        self.metadata: dict[str, Any] = json.loads(found)
        self.row_count = int(self._file.metadata.num_rows)

    def batches(self, rows: int) -> Iterator[tuple[list[bytes], FloatMatrix]]:
        """Yield hashes and vectors; the other columns are not read."""
        for batch in self._file.iter_batches(batch_size=rows, columns=["content_hash", "embedding"]):
            # flatten, not values: a slice of the batch has its own part of them.
            flat = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)
            yield batch.column("content_hash").to_pylist(), flat.reshape(batch.num_rows, -1)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
