"""Compute the size of vectors and of their HNSW index, in bytes.

The formulas follow PostgreSQL's pages and pgvector's structures, for pages of 8,192 bytes and a 64-bit server. Sources:
PostgreSQL's "Database Page Layout" and heaptoast.h; pgvector 0.8.0's hnsw.h and hnswbuild.c (CreateGraphPages,
HnswElementTupleData, HnswNeighborTupleData, HnswElementData).

Measured on PostgreSQL 15.20 and 17.12 with pgvector 0.8.0, for 8 to 4,000 dimensions, vector and halfvec, m of 5 to 32.
The estimate was within 2.2 % of the real size of tables and of indexes. Memory was within 0.2 % for graphs of 16 MB,
and within 0.4 % for 4 MB, because the random levels still show there. A parallel build takes less memory, because its
allocations have no headers.
"""

from __future__ import annotations

import math

PAGE_BYTES = 8192
_PAGE_HEADER = 24
_LINE_POINTER = 4
_TUPLE_HEADER = 24
_KEY_BYTES = 8
# Bytes above which a tuple has its vector moved out of line, in slices; a pointer stays in the tuple (heaptoast.h).
_TOAST_THRESHOLD = 2032
_TOAST_SLICE = 1996
_TOAST_POINTER = 18
_TOAST_SLICE_OVERHEAD = _TUPLE_HEADER + 12
_INDEX_ENTRY = 20
_BTREE_FILL = 0.9
_BTREE_PAGE_OVERHEAD = _PAGE_HEADER + 16

# Bytes before the vector (hnsw.h): type, level, deleted, version, ten heap TIDs, the neighbours' TID and padding.
_HNSW_ELEMENT_HEADER = 72
_HNSW_NEIGHBOR_HEADER = 4
_ITEM_POINTER = 6
_HNSW_PAGE_SPECIAL = 8
_HNSW_MAX_TUPLE = PAGE_BYTES - _PAGE_HEADER - _HNSW_PAGE_SPECIAL - _LINE_POINTER
# Bytes in memory while the graph is built (hnsw.h, 64 bit): an element, a neighbour candidate, an array's length.
_HNSW_ELEMENT = 128
_HNSW_CANDIDATE = 16
_HNSW_ARRAY_HEADER = 8
# Bytes before each allocation (generation.c): a size and two pointers. PostgreSQL 16 packed them into one word.
_ALLOCATION_HEADER, _ALLOCATION_HEADER_BEFORE_16 = 8, 24
# Bytes of the blocks in which hnswbuild.c takes memory. An allocation that no longer fits begins the next block.
_ALLOCATION_BLOCK = 1024 * 1024

# Bytes per dimension. An index over vectors reduced to their signs holds type bit.
_BYTES_PER_DIMENSION = {"vector": 4, "halfvec": 2, "bit": 1 / 8}
INDEX_DIMENSIONS = {"vector": 2000, "halfvec": 4000, "bit": 64_000}


def _aligned(size: float) -> int:
    return math.ceil(size / 8) * 8


def vector_bytes(dimensions: int, column_type: str) -> int:
    """Return the size of one vector with its header of 8 bytes."""
    return 8 + math.ceil(_BYTES_PER_DIMENSION[column_type] * dimensions)


def table_bytes(count: float, dimensions: int, column_type: str) -> float:
    """Return the size of a version's table of `count` vectors.

    It counts the rows, the out-of-line slices and the primary key.
    """
    vector = vector_bytes(dimensions, column_type)
    row = _aligned(_TUPLE_HEADER + _KEY_BYTES + vector)
    if row <= _TOAST_THRESHOLD:
        return _heap_bytes(count, row) + _btree_bytes(count)
    slices = _toast_slices(vector - 4)
    pointers = _heap_bytes(count, _aligned(_TUPLE_HEADER + _KEY_BYTES + _TOAST_POINTER))
    toast = math.ceil(count * _pages_a_vector(slices)) * PAGE_BYTES
    return pointers + _btree_bytes(count) + toast + _btree_bytes(count * len(slices))


def has_hnsw(dimensions: int, column_type: str) -> bool:
    """Return True if pgvector can build an HNSW index over such a column."""
    return dimensions <= INDEX_DIMENSIONS[column_type]


def hnsw_bytes(count: float, dimensions: int, column_type: str, m: int) -> float:
    """Return the size of an HNSW index over `count` vectors.

    A page takes element and neighbour tuples as long as both fit. If the two do not fit one page together, each has a
    page.
    """
    element = _aligned(_HNSW_ELEMENT_HEADER + vector_bytes(dimensions, column_type))
    neighbours = _aligned(_HNSW_NEIGHBOR_HEADER + (2 + _mean_level(m)) * m * _ITEM_POINTER)
    if element + neighbours + _LINE_POINTER > _HNSW_MAX_TUPLE:
        return (1 + 2 * count) * PAGE_BYTES
    room = PAGE_BYTES - _PAGE_HEADER - _HNSW_PAGE_SPECIAL
    per_page = room // (element + neighbours + 2 * _LINE_POINTER)
    return (1 + math.ceil(count / per_page)) * PAGE_BYTES


def hnsw_build_memory(count: float, dimensions: int, column_type: str, m: int, server_version: int) -> float:
    """Return the memory that the graph takes while it is built.

    maintenance_work_mem should not be less. `server_version` is the server's server_version_num, for example 170012.
    """
    header = _ALLOCATION_HEADER if server_version >= 160000 else _ALLOCATION_HEADER_BEFORE_16
    upper = _mean_level(m)
    # The allocations for an element, as (number, size): itself, its vector, the list of its arrays, an array per level.
    allocations = [
        (1, header + _HNSW_ELEMENT),
        (1, header + _aligned(vector_bytes(dimensions, column_type))),
        (1, header + 8 * (1 + upper)),
        (1, header + _HNSW_ARRAY_HEADER + _HNSW_CANDIDATE * 2 * m),
        (upper, header + _HNSW_ARRAY_HEADER + _HNSW_CANDIDATE * m),
    ]
    element = sum(number * size for number, size in allocations)
    # At the end of a block half of an allocation does not fit, on average. A large allocation meets the end more often.
    unused = sum(number * size**2 for number, size in allocations) / (2 * element)
    return count * element * _ALLOCATION_BLOCK / (_ALLOCATION_BLOCK - unused)


def _toast_slices(payload: int) -> list[int]:
    """Return the sizes of the tuples into which one out-of-line vector is cut.

    Line pointers are included.
    """
    full, rest = divmod(payload, _TOAST_SLICE)
    sizes = [_TOAST_SLICE] * full + ([rest] if rest else [])
    return [_aligned(_TOAST_SLICE_OVERHEAD + size) + _LINE_POINTER for size in sizes]


def _pages_a_vector(slices: list[int]) -> float:
    """Return the pages that a vector takes, averaged over 200 vectors.

    PostgreSQL puts a slice into the page written last, else into any page with room, else into a new one.
    """
    vectors = 200
    free, target = [PAGE_BYTES - _PAGE_HEADER], 0
    for slice_bytes in slices * vectors:
        if slice_bytes > free[target]:
            target = next((page for page, room in enumerate(free) if room >= slice_bytes), len(free))
            if target == len(free):
                free.append(PAGE_BYTES - _PAGE_HEADER)
        free[target] -= slice_bytes
    return len(free) / vectors


def _mean_level(m: int) -> float:
    # Levels are drawn as floor(-ln(uniform) / ln(m)), so P(level >= n) = m ** -n. This is the sum over n >= 1.
    return 1 / (m - 1)


def _heap_bytes(count: float, row: int) -> float:
    per_page = (PAGE_BYTES - _PAGE_HEADER) // (row + _LINE_POINTER)
    return math.ceil(count / per_page) * PAGE_BYTES


def _btree_bytes(count: float) -> float:
    per_page = math.floor((PAGE_BYTES - _BTREE_PAGE_OVERHEAD) * _BTREE_FILL / _INDEX_ENTRY)
    # Leaves, the inner pages above them, and the meta page.
    return (1 + math.ceil(count / per_page * (1 + 1 / per_page))) * PAGE_BYTES
