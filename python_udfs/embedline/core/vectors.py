"""Check, normalise and serialise vectors, with plain numpy on whole arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedline.errors import DimensionMismatch, InvalidVectors

FloatMatrix = npt.NDArray[np.float32]

HALF_MAX = float(np.finfo(np.float16).max)
# Squared norm below which float32 has lost digits.
_SMALLEST_SQUARE = 1e-30
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + b"\x00" * 8
_COPY_TRAILER = b"\xff\xff"


def matrix_from_bytes(data: bytes, count: int, dimensions: int) -> FloatMatrix:
    """Return little-endian float32 `data` as an array of shape (count, dimensions)."""
    if len(data) != 4 * count * dimensions:
        raise InvalidVectors(
            "the vectors have another size than announced",
            detail=f"{len(data)} bytes for {count} vectors of {dimensions} dimensions",
        )
    matrix: FloatMatrix = np.frombuffer(data, dtype="<f4").reshape(count, dimensions).astype(np.float32, copy=False)
    return matrix


def check_shape(matrix: FloatMatrix, count: int, dimensions: int) -> None:
    """Raise unless `matrix` holds exactly `count` vectors of `dimensions` values."""
    if matrix.shape[0] != count:
        raise InvalidVectors(f"the model returned {matrix.shape[0]} vectors for {count} texts")
    if matrix.shape[1] != dimensions:
        raise DimensionMismatch(f"the model returned {matrix.shape[1]} dimensions, the column has {dimensions}")


def find_faults(matrix: FloatMatrix, column_type: str) -> dict[int, str]:
    """Return {row number: reason} of the vectors that must not be stored.

    An HNSW index silently leaves out a vector with NaN, infinity or norm zero. float16 overflows past 65504.
    """
    finite = np.isfinite(matrix).all(axis=1)
    squared = np.einsum(
        "ij,ij->i", np.where(np.isfinite(matrix), matrix, 0).astype(np.float64), matrix.astype(np.float64)
    )
    faults = {int(row): "the vector has a value that is not a finite number" for row in np.flatnonzero(~finite)}
    faults |= {int(row): "the vector has norm zero" for row in np.flatnonzero(finite & (squared == 0))}
    if column_type == "halfvec":
        overflow = finite & (np.abs(matrix) > HALF_MAX).any(axis=1)
        with np.errstate(over="ignore"):
            vanished = finite & (squared > 0) & ~matrix.astype(np.float16).any(axis=1)
        faults |= {int(row): "the vector is zero in the float16 of halfvec" for row in np.flatnonzero(vanished)}
        faults |= {
            int(row): "the vector has a value outside the float16 range of halfvec" for row in np.flatnonzero(overflow)
        }
    return faults


def usable_vectors(matrix: FloatMatrix, column_type: str, normalised: bool) -> tuple[FloatMatrix, dict[int, str]]:
    """Return the rows to store, and {row number: reason} of the unusable ones.

    Faulty rows stay in the array, unchanged. The common case costs one pass, because a sound row has a squared norm in
    float32 that is finite and far from zero. All other rows are examined one by one in float64.
    """
    squared = np.einsum("ij,ij->i", matrix, matrix)
    plain = bool(np.isfinite(squared).all() and (squared > _SMALLEST_SQUARE).all())
    faults = {} if plain and column_type == "vector" else find_faults(matrix, column_type)
    if not normalised:
        return matrix, faults
    if plain:
        # Accurate to about 1e-7. Norms in float64 would cost four times this.
        return matrix / np.sqrt(squared)[:, np.newaxis], faults
    unit = matrix.copy()
    sound = [row for row in range(len(matrix)) if row not in faults]
    unit[sound] = normalise(matrix[sound])
    return unit, faults


def normalise(matrix: FloatMatrix) -> FloatMatrix:
    """Return the rows divided by their L2 norm, which is computed in float64.

    Rows must be finite and not zero.
    """
    wide = matrix.astype(np.float64)
    unit: FloatMatrix = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
    return unit


def literal(vector: FloatMatrix) -> str:
    """Return one vector, shape (dimensions,), in pgvector's text form."""
    return "[" + ",".join([f"{value:.9g}" for value in vector.tolist()]) + "]"


def copy_binary(chunk_ids: npt.NDArray[np.int64], matrix: FloatMatrix, column_type: str) -> bytearray:
    """Return rows (chunk_id bigint, embedding vector|halfvec) for COPY BINARY.

    Format: postgresql.org/docs/current/sql-copy.html, "Binary Format". The vector's own binary form (int16 dimensions,
    int16 unused, big-endian floats) is that of pgvector's vector_send and halfvec_send.
    """
    count, dimensions = matrix.shape
    element = ">f4" if column_type == "vector" else ">f2"
    layout = np.dtype(
        [
            ("fields", ">i2"),
            ("id_bytes", ">i4"),
            ("id", ">i8"),
            ("vector_bytes", ">i4"),
            ("dimensions", ">i2"),
            ("unused", ">i2"),
            ("values", element, (dimensions,)),
        ]
    )
    # Filled in place, because each further copy of 20,000 x 384 values costs as much as a tenth of the whole write.
    buffer = bytearray(len(_COPY_HEADER) + count * layout.itemsize + len(_COPY_TRAILER))
    buffer[: len(_COPY_HEADER)] = _COPY_HEADER
    buffer[-len(_COPY_TRAILER) :] = _COPY_TRAILER
    rows = np.frombuffer(buffer, dtype=layout, count=count, offset=len(_COPY_HEADER))
    rows["fields"] = 2
    rows["id_bytes"] = 8
    rows["id"] = chunk_ids
    rows["vector_bytes"] = 4 + np.dtype(element).itemsize * dimensions
    rows["dimensions"] = dimensions
    rows["unused"] = 0
    rows["values"] = matrix
    return buffer


def vectors_to_send(matrix: FloatMatrix, column_type: str) -> list[bytes]:
    """Return each row of an array in the form of vector_send or halfvec_send.

    The shape is (vectors, dimensions).
    """
    head = matrix.shape[1].to_bytes(2, "big") + b"\x00\x00"
    element = ">f4" if column_type == "vector" else ">f2"
    return [head + row.tobytes() for row in matrix.astype(element)]


def vectors_from_send(blobs: list[bytes], column_type: str) -> FloatMatrix:
    """Return vectors in the form of vector_send or halfvec_send as a float32 array.

    Each of `blobs` is one vector; the shape is (vectors, dimensions).
    """
    element = ">f4" if column_type == "vector" else ">f2"
    joined = np.frombuffer(b"".join(blobs), dtype=np.uint8).reshape(len(blobs), -1)
    return np.ascontiguousarray(joined[:, 4:]).view(element).astype(np.float32)
