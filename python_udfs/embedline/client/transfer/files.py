"""Files of exported vectors: Parquet, or one .npz.

Both are written batch by batch and read batch by batch, so memory does not grow with the rows.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from embedline.core.vectors import FloatMatrix
from embedline.errors import InvalidParameter

SUFFIXES = (".parquet", ".npz")
# Version of the layout of both forms.
FORMAT = 1


@dataclass(frozen=True)
class Batch:
    """Rows of a file: their values and their vectors.

    Each sequence has a value for each row. `hashes` are of 16 bytes each. `columns` are those of the source, by name.
    """

    keys: Sequence[str]
    places: Sequence[tuple[int, int, int]]
    chunks: Sequence[str]
    hashes: Sequence[bytes]
    columns: dict[str, Sequence[Any]]
    vectors: FloatMatrix


class Writer(Protocol):
    """A file that is being written."""

    def write(self, batch: Batch) -> None:
        """Append rows."""

    def finish(self) -> None:
        """Write the end of the file."""

    def close(self) -> None:
        """Release what is open, also after a failure."""


class Reader(Protocol):
    """A file that is read."""

    metadata: dict[str, Any]
    row_count: int

    def batches(self, rows: int) -> Iterator[tuple[list[bytes], FloatMatrix]]:
        """Yield hashes and vectors of up to `rows` rows at a time."""

    def close(self) -> None:
        """Close the file."""


class UnusableFile(InvalidParameter):
    """The file has no exported vectors."""


def form_of(path: Path) -> str:
    """Return the form of a file by its name; raise InvalidParameter."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidParameter(f"{path} names no form", hint=f"End the name with one of {', '.join(SUFFIXES)}.")
    return suffix


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file beside `path`, which takes its place at the end.

    After a failure nothing of it is left, and an earlier file is as it was. Raises OSError.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        # mkstemp closes the file to all others; an export is as open as any file that its writer makes.
        os.chmod(name, 0o666 & ~umask)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
