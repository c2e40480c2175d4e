"""Exported vectors as one .npz.

It has numpy arrays in a zip file, and the texts as lines of JSON:

    vectors.npy          float32, (rows, dimensions)
    content_hashes.npy   uint8, (rows, 16)
    rows.jsonl           one object for each row: key, chunk_seq, chunk_start, chunk_end, chunk, columns of the source
    embedline.json       the metadata

numpy.load reads each by its name. An array of texts would be as wide as the longest of them, or pickled.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from embedline.client.transfer.files import Batch, UnusableFile
from embedline.core.vectors import FloatMatrix

_METADATA, _ROWS = "embedline.json", "rows.jsonl"
_VECTORS, _HASHES = "vectors.npy", "content_hashes.npy"
_HASH_BYTES = 16


class NpzWriter:
    """Three files beside the target, which are put together at the end.

    A zip file is written one member after the other, and the number of rows stands before an array.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], dimensions: int) -> None:
        """Open the parts in the target's folder, where there must be room anyway."""
        self._path, self._metadata, self._dimensions = path, metadata, dimensions
        self._count = 0
        with contextlib.ExitStack() as stack:
            self._vectors, self._hashes, self._rows = (
                stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in range(3)
            )
            self._open = stack.pop_all()

    def write(self, batch: Batch) -> None:
        """Append rows."""
        self._vectors.write(np.ascontiguousarray(batch.vectors, dtype="<f4").tobytes())
        self._hashes.write(b"".join(batch.hashes))
        for i, (key, (seq, start, end), chunk) in enumerate(zip(batch.keys, batch.places, batch.chunks, strict=True)):
            of_source = {name: values[i] for name, values in batch.columns.items()}
            row = {"key": key, "chunk_seq": seq, "chunk_start": start, "chunk_end": end, "chunk": chunk, **of_source}
            self._rows.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._count += len(batch.keys)

    def finish(self) -> None:
        """Put the parts together."""
        with zipfile.ZipFile(self._path, "w", zipfile.ZIP_STORED) as archive:
            # Of more than 2 GB, too.
            with archive.open(_VECTORS, "w", force_zip64=True) as member:
                _copy_array(self._vectors, member, "<f4", (self._count, self._dimensions))
            with archive.open(_HASHES, "w", force_zip64=True) as member:
                _copy_array(self._hashes, member, "|u1", (self._count, _HASH_BYTES))
            deflated = zipfile.ZipInfo(_ROWS)
            deflated.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(deflated, "w", force_zip64=True) as member:
                self._rows.seek(0)
                shutil.copyfileobj(self._rows, member)
            archive.writestr(_METADATA, json.dumps(self._metadata, indent=2))

    def close(self) -> None:
        """Remove the parts."""
        self._open.close()


def _copy_array(part: IO[bytes], member: IO[bytes], kind: str, shape: tuple[int, int]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    member.write(header.getvalue())
    part.seek(0)
    shutil.copyfileobj(part, member)


class NpzReader:
    """An .npz file that `export` has written."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its metadata."""
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UnusableFile(f"{path} is no .npz file: {error}") from None
        if not {_METADATA, _VECTORS, _HASHES} <= set(self._archive.namelist()):
            raise UnusableFile(f"{path} was not written by embedline export")
        self.metadata: dict[str, Any] = json.loads(self._archive.read(_METADATA))
        with self._archive.open(_VECTORS) as member:
            self.row_count = _shape(member)[0]

    def batches(self, rows: int) -> Iterator[tuple[list[bytes], FloatMatrix]]:
        """Yield hashes and vectors; the texts are not read."""
        with self._archive.open(_VECTORS) as of_vectors, self._archive.open(_HASHES) as of_hashes:
            count, dimensions = _shape(of_vectors)
            _shape(of_hashes)
            for start in range(0, count, rows):
                size = min(rows, count - start)
                hashes = of_hashes.read(_HASH_BYTES * size)
                data = of_vectors.read(4 * dimensions * size)
                matrix = np.frombuffer(data, dtype="<f4").reshape(size, dimensions).astype(np.float32)
                yield [hashes[i : i + _HASH_BYTES] for i in range(0, len(hashes), _HASH_BYTES)], matrix

    def close(self) -> None:
        """Close the file."""
        self._archive.close()


def _shape(member: IO[bytes]) -> tuple[int, int]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, _ = read(member)
    return int(shape[0]), int(shape[1])
