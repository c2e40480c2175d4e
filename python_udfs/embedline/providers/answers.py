"""Interpret answers with an unclear order of vectors or unexpected bytes."""

from __future__ import annotations

import itertools
import math
import statistics
import struct
from collections import Counter
from collections.abc import Sequence

from embedline.errors import InvalidVectors

# Encodings that providers send by mistake in place of base64 of little-endian float32, with their struct codes.
_MISTAKEN_ENCODINGS = {
    "big-endian float32": ">f",
    "float64": "<d",
    "big-endian float64": ">d",
    "float16": "<e",
    "big-endian float16": ">e",
}
# Fewest values of a vector whose bytes are doubted. A shorter vector may resemble another encoding by chance.
_DOUBTED_VALUES = 8
# Bounds of an embedding's largest value. Real values lie within a few powers of ten, bytes of another encoding within
# seventy.
_LARGEST_VALUES = (1e-6, 1e6)
# Bounds within which nearly all embeddings lie. They are not checked further, because the median costs three times as
# much.
_COMMON_VALUES = (1e-9, 1e4)
_LARGEST_TO_MEDIAN = 300.0
_SMALLEST_TO_MEDIAN = 1e-5
# Least shares of values that are not zero, and that differ from each other, in a plausible encoding.
_FEWEST_NONZERO = 0.75
_FEWEST_DISTINCT = 0.5


class UnknownOrder(InvalidVectors):
    """The provider returned vectors in an order that their indexes do not tell."""


def text_numbers(items: Sequence[object], *, keeps_order: bool) -> tuple[list[int], bool]:
    """Return the number of each vector's text, and True if `index` says so in full.

    A number that is missing, out of range or repeated is not used. If the others agree with the order of the texts, or
    rise from vector to vector, the vectors are in that order. Otherwise a single missing number is the one left over,
    because servers written in Go leave a 0 out.

    Raises UnknownOrder if the numbers contradict each other, or do not tell one vector from the same one. It also does if
    vectors would be taken by position although an earlier answer had them in another order (not `keeps_order`).
    """
    raw = [item.get("index") if isinstance(item, dict) else None for item in items]
    given = [_index(value) for value in raw]
    counts = Counter(given)
    usable = {place: n for place, n in enumerate(given) if n is not None and n < len(items) and counts[n] == 1}
    if len(usable) == len(items):
        return list(usable.values()), all(type(value) is int for value in raw)
    if not usable or any(place != number for place, number in usable.items()):
        if len(usable) == len(items) - 1 and None in counts and not _has_repeated_vector(items):
            (left,) = set(range(len(items))) - set(usable.values())
            return [usable.get(place, left) for place in range(len(items))], False
        tells_nothing = not usable or None not in counts
        keeps_order = keeps_order and tells_nothing and _rises([number for number in given if number is not None])
    if len(items) > 1 and (not keeps_order or _has_repeated_vector(items)):
        raise UnknownOrder
    return list(range(len(items))), False


def _has_repeated_vector(items: Sequence[object]) -> bool:
    """Return True if two items have the same vector.

    Different texts seldom have one vector, but an item may stand in the place of another.
    """
    found = [item.get("embedding") for item in items if isinstance(item, dict)]
    vectors = [repr(vector) for vector in found if vector is not None]
    return len(set(vectors)) < len(vectors)


def _rises(numbers: Sequence[int]) -> bool:
    """Return True if the numbers rise one by one or by more, or are all the same.

    They may begin again at 0 for each part of a request, if each part counts up one by one.
    """
    pairs = list(itertools.pairwise(numbers))
    if len(set(numbers)) <= 1 or all(second > first for first, second in pairs):
        return True
    return numbers[0] == 0 and all(second in (0, first + 1) for first, second in pairs)


def _index(value: object) -> int | None:
    """Return an index as a number, or None if it is not one.

    Numbers written as a string or a float count, too.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value[:18])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # A bool is an int in Python. Some servers send -1 for "not set".
    return value if type(value) is int and value >= 0 else None


def mistaken_encoding(row: bytes) -> str | None:
    """Return the encoding of a vector's bytes, None for little-endian float32.

    Another encoding is returned only if the bytes make sense in it and do not as little-endian float32.
    """
    if len(row) % 4 or _makes_sense(row):
        return None
    for name, code in _MISTAKEN_ENCODINGS.items():
        if len(row) % struct.calcsize(code) == 0:
            values = _values(row, code)
            sizes = [abs(value) for value in values if value]
            varied = min(len(set(sizes)) / _FEWEST_DISTINCT, len(sizes) / _FEWEST_NONZERO)
            if len(values) >= _DOUBTED_VALUES and varied >= len(values) and _is_narrow(sizes):
                return name
    return None


def _makes_sense(row: bytes) -> bool:
    """Return True if float32 values could be an embedding.

    Values that are not finite are left to another check.
    """
    sizes = list(map(abs, _values(row, "<f")))
    if sizes and _COMMON_VALUES[0] <= min(sizes) and max(sizes) <= _COMMON_VALUES[1]:
        return True
    sizes = [size for size in sizes if size and math.isfinite(size)]
    return not sizes or (_is_narrow(sizes) and min(sizes) >= _SMALLEST_TO_MEDIAN * statistics.median_high(sizes))


def _values(row: bytes, code: str) -> tuple[float, ...]:
    return struct.unpack(f"{code[0]}{len(row) // struct.calcsize(code)}{code[1]}", row)


def _is_narrow(sizes: Sequence[float]) -> bool:
    largest = max(sizes)
    within = math.isfinite(sum(sizes)) and _LARGEST_VALUES[0] <= largest <= _LARGEST_VALUES[1]
    return within and largest <= _LARGEST_TO_MEDIAN * statistics.median_high(sizes)
