"""Which text a vector belongs to where a provider's answer is vague, and bytes that are not the float32 they should be."""

from __future__ import annotations

import numpy as np
import pytest

from embedline.providers.answers import UnknownOrder, mistaken_encoding, text_numbers


def numbers(*indexes: object, keeps_order: bool = True) -> list[int]:
    items = [{} if index == "missing" else {"index": index} for index in indexes]
    return text_numbers(items, keeps_order=keeps_order)[0]


@pytest.mark.parametrize(
    ("indexes", "expected"),
    [
        ((2, 0, 1), [2, 0, 1]),
        (("2", "0", "1"), [2, 0, 1]),
        ((2.0, 0.0, 1.0), [2, 0, 1]),
        # Written by a server that leaves a zero out, in whatever order.
        (("missing", 1, 2), [0, 1, 2]),
        ((2, "missing", 1), [2, 0, 1]),
        ((2, 1, None), [2, 1, 0]),
        (("missing", "missing", 2), [0, 1, 2]),
        ((None, None, None), [0, 1, 2]),
        ((0, 0, 0), [0, 1, 2]),
        ((1, 2, 3), [0, 1, 2]),
        ((0, 1, 1), [0, 1, 2]),
        ((0, 0, 2), [0, 1, 2]),
        ((0, 1, 0), [0, 1, 2]),
        ((0, 1, 9), [0, 1, 2]),
        ((7, 8, 9), [0, 1, 2]),
        ((0, -1, 2), [0, 1, 2]),
        ((True, True, True), [0, 1, 2]),
        (("a", {}, []), [0, 1, 2]),
        (("9" * 5000, 1, 2), [0, 1, 2]),
        ((9, 1, 2), [0, 1, 2]),
        ((2, 1, 2), [0, 1, 2]),
        ((0, 1, 2, 3, 0, 1, 2, 3, 0), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ((float("nan"), float("inf"), 0.5), [0, 1, 2]),
        ((5,), [0]),
    ],
)
def test_vectors_go_to_the_texts_that_their_indexes_mean(indexes: tuple[object, ...], expected: list[int]) -> None:
    assert numbers(*indexes) == expected


@pytest.mark.parametrize(
    "indexes", [(9, 8, 7), (2, "missing", "missing"), (2, 1, 1), (1, 0, 0), (0, 9, 1), (1, 0, 1, 0)]
)
def test_an_order_that_is_contradicted_is_not_guessed(indexes: tuple[object, ...]) -> None:
    with pytest.raises(UnknownOrder):
        numbers(*indexes)


@pytest.mark.parametrize("indexes", [(0, 0), (1, 1), (1, None), (None, None), (0, 9)])
def test_a_vector_that_is_there_twice_is_not_taken_for_that_of_another_text(indexes: tuple[object, ...]) -> None:
    for vector in ([0.5, 1.0], "AAAAPwAAgD8="):
        items = [{"index": index, "embedding": vector} for index in indexes]
        with pytest.raises(UnknownOrder):
            text_numbers(items, keeps_order=True)
    # Numbers that say all are believed: two texts may mean the same to a model.
    items = [{"index": index, "embedding": [0.5, 1.0]} for index in (1, 0)]
    assert text_numbers(items, keeps_order=True) == ([1, 0], True)


def test_after_another_order_was_seen_nothing_is_taken_by_position() -> None:
    with pytest.raises(UnknownOrder):
        numbers("missing", "missing", keeps_order=False)
    assert numbers("missing", keeps_order=False) == [0]
    assert numbers(1, "missing", keeps_order=False) == [1, 0]
    with pytest.raises(UnknownOrder):
        numbers(0, "missing", "missing", keeps_order=False)


def test_only_whole_numbers_throughout_count_as_said_in_full() -> None:
    assert text_numbers([{"index": 1}, {"index": 0}], keeps_order=True) == ([1, 0], True)
    assert text_numbers([{"index": "0"}, {"index": 1}], keeps_order=True) == ([0, 1], False)
    assert text_numbers(["no object", {"index": 1}], keeps_order=True) == ([0, 1], False)
    assert text_numbers([], keeps_order=True) == ([], True)


ENCODINGS = {
    "big-endian float32": ">f4",
    "float64": "<f8",
    "big-endian float64": ">f8",
    "float16": "<f2",
    "big-endian float16": ">f2",
}


@pytest.mark.parametrize("scale", [1.0, 0.03])
@pytest.mark.parametrize("name", ENCODINGS)
def test_bytes_of_another_encoding_are_told(name: str, scale: float) -> None:
    vectors = np.random.default_rng(1).standard_normal((100, 384)) * scale
    assert {mistaken_encoding(vector.astype(ENCODINGS[name]).tobytes()) for vector in vectors} == {name}


def test_float32_that_was_widened_is_told() -> None:
    vectors = np.random.default_rng(1).standard_normal((100, 384), dtype=np.float32).astype("<f8")
    assert {mistaken_encoding(vector.tobytes()) for vector in vectors} == {"float64"}


@pytest.mark.parametrize("dimensions", [1, 4, 8, 16, 64, 384])
def test_float32_is_never_taken_for_another_encoding(dimensions: int) -> None:
    random = np.random.default_rng(dimensions)
    for scale in (1.0, 0.03, 1000.0):
        vectors = random.standard_normal((2000, dimensions), dtype=np.float32) * np.float32(scale)
        assert not [vector for vector in vectors if mistaken_encoding(vector.astype("<f4").tobytes())]


def test_values_that_must_not_be_stored_are_no_matter_of_the_encoding() -> None:
    random = np.random.default_rng(1)
    for dimensions in (8, 16, 384):
        for value in (np.nan, np.inf, -np.inf, 0.0):
            for count in (1, dimensions // 2, dimensions):
                vector = random.standard_normal(dimensions).astype("<f4")
                vector[random.choice(dimensions, count, replace=False)] = value
                assert mistaken_encoding(vector.tobytes()) is None
    assert mistaken_encoding(b"") is None
    assert mistaken_encoding(b"odd") is None
