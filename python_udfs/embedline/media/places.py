"""Lay out segments along a line."""

from __future__ import annotations

from embedline.errors import InputRejected

# Most segments of one image or recording: each becomes a row of the chunks and a vector.
MAX_SEGMENTS = 10_000


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Return where pieces of `size` begin, so that they cover a line of `length`.

    Neighbours share at least `overlap`. The last piece ends with the line, so that it is no smaller than the others.
    """
    if length <= size:
        return [0]
    step = size - overlap
    return [*range(0, length - size, step), length - size]


def require_few(count: int, name: str) -> None:
    """Raise InputRejected if a file has more segments than are embedded."""
    if count > MAX_SEGMENTS:
        raise InputRejected(
            f"the file has {count} {name}; at most {MAX_SEGMENTS} are embedded",
            hint="Choose larger ones in the pipeline's chunk_options.",
        )
