"""Vectors are checked before they are stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from embedline.core.vectors import (
    HALF_MAX,
    check_shape,
    copy_binary,
    find_faults,
    matrix_from_bytes,
    normalise,
    vectors_from_send,
    vectors_to_send,
)
from embedline.errors import DimensionMismatch, InvalidVectors

_SHAPES = nps.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=16)
_MATRICES = nps.arrays(np.float32, _SHAPES, elements=st.floats(width=32))
_FINITE = nps.arrays(np.float32, _SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@given(_MATRICES)
def test_a_sound_vector_normalises_to_length_one(matrix: np.ndarray) -> None:
    faults = find_faults(matrix, "vector")
    sound = matrix[[row for row in range(len(matrix)) if row not in faults]]
    if not len(sound):
        return
    result = normalise(sound)
    assert result.dtype == np.float32
    assert np.allclose(np.linalg.norm(result.astype(np.float64), axis=1), 1, atol=1e-5)
    assert not find_faults(result, "halfvec")
    assert np.array_equal(np.sign(result)[np.abs(result) > 1e-30], np.sign(sound)[np.abs(result) > 1e-30])


@given(_MATRICES, st.sampled_from(["vector", "halfvec"]))
def test_exactly_the_unusable_rows_are_at_fault(matrix: np.ndarray, column_type: str) -> None:
    def unusable(row: np.ndarray) -> bool:
        wide = row.astype(np.float64)
        if not np.isfinite(wide).all() or not wide.any():
            return True
        if column_type != "halfvec":
            return False
        # Below 2^-25 float16 rounds to zero: nothing of the vector would be left.
        return bool((np.abs(wide) > HALF_MAX).any()) or not (np.abs(wide) > 2.0**-25).any()

    assert set(find_faults(matrix, column_type)) == {i for i, row in enumerate(matrix) if unusable(row)}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1.0, float("nan")], "finite"),
        ([float("inf"), 1.0], "finite"),
        ([-float("inf"), float("inf")], "finite"),
        ([0.0, 0.0], "norm zero"),
        ([0.0, -0.0], "norm zero"),
        ([1.0, 65520.0], "float16"),
        ([-70000.0, 1.0], "float16"),
    ],
)
def test_the_reason_of_a_fault_is_named(row: list[float], reason: str) -> None:
    matrix = np.array([[1.0, 1.0], row], dtype=np.float32)
    faults = find_faults(matrix, "halfvec")
    assert list(faults) == [1]
    assert reason in faults[1]


def test_the_largest_float16_is_accepted_and_a_vector_column_takes_more() -> None:
    assert not find_faults(np.array([[HALF_MAX, -HALF_MAX]], dtype=np.float32), "halfvec")
    assert not find_faults(np.array([[70000.0, 3e38]], dtype=np.float32), "vector")


def test_subnormal_vectors_have_a_direction() -> None:
    tiny = np.array([[1e-40, 0.0]], dtype=np.float32)
    assert not find_faults(tiny, "vector")
    assert np.allclose(normalise(tiny), [[1.0, 0.0]])


def test_a_vector_that_float16_would_round_to_zero_is_at_fault() -> None:
    """Stored as halfvec without normalisation (l2), it would have norm zero."""
    assert find_faults(np.array([[1e-9, -1e-9]], dtype=np.float32), "halfvec")


@given(_FINITE)
def test_bytes_become_the_matrix_that_they_were(matrix: np.ndarray) -> None:
    data = matrix.astype("<f4").tobytes()
    assert np.array_equal(matrix_from_bytes(data, *matrix.shape), matrix)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\0" * 23, b"\0" * 25])
def test_bytes_of_another_length_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidVectors, match="size"):
        matrix_from_bytes(data, 2, 3)


def test_a_wrong_count_or_dimension_is_refused() -> None:
    matrix = np.ones((2, 3), dtype=np.float32)
    check_shape(matrix, 2, 3)
    with pytest.raises(InvalidVectors, match="2 vectors for 3 texts"):
        check_shape(matrix, 3, 3)
    with pytest.raises(DimensionMismatch, match="3 dimensions") as caught:
        check_shape(matrix, 2, 4)
    assert caught.value.sqlstate == "EL004"


@given(_FINITE, st.sampled_from(["vector", "halfvec"]))
def test_copy_data_hold_what_vector_send_would_give(matrix: np.ndarray, column_type: str) -> None:
    if column_type == "halfvec":
        matrix = np.clip(matrix, -HALF_MAX, HALF_MAX)
    count, dimensions = matrix.shape
    ids = np.arange(count, dtype=np.int64) - 1
    data = copy_binary(ids, matrix, column_type)
    assert data.startswith(b"PGCOPY\n\xff\r\n\0")
    assert data.endswith(b"\xff\xff")
    size = 4 + (4 if column_type == "vector" else 2) * dimensions
    rows = [data[19 + i * (18 + size) :][: 18 + size] for i in range(count)]
    assert len(data) == 19 + count * (18 + size) + 2
    for i, row in enumerate(rows):
        assert row[:2] == b"\0\2"
        assert int.from_bytes(row[6:14], "big", signed=True) == ids[i]
        assert int.from_bytes(row[14:18], "big") == size
    exact = matrix if column_type == "vector" else matrix.astype(np.float16).astype(np.float32)
    assert np.array_equal(vectors_from_send([row[18:] for row in rows], column_type), exact)
    assert vectors_to_send(matrix, column_type) == [bytes(row[18:]) for row in rows]
