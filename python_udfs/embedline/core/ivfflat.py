"""Compute the lists, the size and the build memory of an IVFFlat index.

Sources: pgvector 0.8's README (number of lists), ivfbuild.c (samples), ivfkmeans.c (allocations of ElkanKmeans), ivfflat.h
(pages).
"""

from __future__ import annotations

import math

from embedline.core.storage_size import PAGE_BYTES, vector_bytes

# pgvector's bound of the index option and of ivfflat.probes.
MAX_LISTS = 32_768
# Rows above which the number of lists grows with their square root, and the rows of a list up to there.
_MANY_ROWS, _ROWS_A_LIST = 1_000_000, 1_000
# Vectors that k-means learns from, for each list and at least.
_SAMPLES_A_LIST, _FEWEST_SAMPLES = 50, 10_000
_PAGE_HEADER, _PAGE_SPECIAL, _LINE_POINTER = 24, 8, 4
# Bytes before the vector in a list (a tuple's header), and before a list's centre (two block numbers).
_ENTRY_HEADER, _LIST_HEADER = 8, 8


def default_lists(rows: float) -> int:
    """Return the number of lists for an index over `rows` vectors.

    It is the rule of pgvector's README: a thousandth of up to a million rows, the square root of more.
    """
    wanted = rows / _ROWS_A_LIST if rows <= _MANY_ROWS else math.sqrt(rows)
    return min(max(int(wanted), 1), MAX_LISTS)


def build_memory(rows: float, dimensions: int, column_type: str, lists: int) -> float:
    """Return the memory that k-means takes.

    A build with less maintenance_work_mem fails. pgvector reserves the samples whole, even if there are fewer rows, and
    learns nothing if there are no more rows than lists.
    """
    vector = _aligned(vector_bytes(dimensions, column_type))
    reserved = max(_SAMPLES_A_LIST * lists, _FEWEST_SAMPLES)
    samples = min(reserved, rows)
    if samples <= lists:
        return float(vector * (reserved + lists))
    # Four bytes each. A sample has its centre and an upper bound. A centre has its size, two distances, and those to the
    # other centres. Each pair of the two has a lower bound.
    numbers = 2 * samples + 3 * lists + lists * lists + samples * lists
    return float(vector * (reserved + 2 * lists) + 4 * numbers)


def index_bytes(rows: float, dimensions: int, column_type: str, lists: int) -> float:
    """Return the size of the index.

    It has the vectors, the centres, and half a page that each list leaves free.
    """
    room = PAGE_BYTES - _PAGE_HEADER - _PAGE_SPECIAL
    vector = vector_bytes(dimensions, column_type)
    entries = room // (_aligned(_ENTRY_HEADER + vector) + _LINE_POINTER)
    centres = room // (_aligned(_LIST_HEADER + vector) + _LINE_POINTER)
    # Lists differ in length, so the last page of each is half full on average.
    pages = max(rows / entries + lists / 2, lists)
    return (1 + math.ceil(lists / centres) + math.ceil(pages)) * PAGE_BYTES


def _aligned(size: float) -> int:
    return math.ceil(size / 8) * 8
