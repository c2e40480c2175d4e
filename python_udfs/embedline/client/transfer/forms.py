"""Choose what writes and reads a form of file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedline.client.transfer.files import Reader, Writer, form_of


def writer_of(form: str, path: Path, metadata: dict[str, Any], columns: dict[str, str], dimensions: int) -> Writer:
    """Return a writer of a form. `columns` are names and PostgreSQL's types.

    Raises InvalidParameter if a library is missing.
    """
    if form == ".npz":
        from embedline.client.transfer.npz import NpzWriter

        return NpzWriter(path, metadata, dimensions)
    from embedline.client.transfer.parquet import ParquetWriter

    return ParquetWriter(path, metadata, columns, dimensions)


def reader_of(path: Path) -> Reader:
    """Return a reader of an exported file.

    Raises UnusableFile if it is none, OSError if it cannot be read.
    """
    if form_of(path) == ".npz":
        from embedline.client.transfer.npz import NpzReader

        return NpzReader(path)
    from embedline.client.transfer.parquet import ParquetReader

    return ParquetReader(path)
