"""Pack the words of chunks into pages, and rank chunks by the words of a query.

Arithmetic on arrays; no database. A chunk's place in its segment is its ordinal, 0 to 65,535.

The score is BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009) with the idf of Lucene, which is
never negative:

    score(query, chunk) = sum over the query's words of n * idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * length / mean_length))
    idf = ln(1 + (chunks - df + 0.5) / (df + 0.5))

`tf` counts the word in the chunk, and `n` counts it in the query. `df` counts the chunks with the word. A length counts
words without stop words.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

K1, B = 1.2, 0.75
MAX_CHUNKS = 65_536
# A word's part in a score lies between 0 and K1 + 1. A weight is that in 255 steps, 0.0086 each.
_STEP = (K1 + 1) / 255
MAX_COUNT = 255
# Bytes of a page, below the 2 kB from which PostgreSQL moves values out of the row. A longer list has a page of its own.
_PAGE_BYTES = 1800
# A word that stands in more than this share of the chunks has a weight for each chunk, which is shorter than a list.
_DENSE_SHARE = 1 / 3
_HEADER = struct.Struct("<HBx")
_LIST, _DENSE = 0, 1

Words = npt.NDArray[np.int64]
Ordinals = npt.NDArray[np.uint16]
Weights = npt.NDArray[np.uint8]


class Page(NamedTuple):
    """Words from `first` to `last`, in order, with the chunks of each."""

    first: int
    last: int
    data: bytes


@dataclass(frozen=True)
class Postings:
    """How often which word stands in which chunk: arrays of one length.

    `words` are hashes of 64 bits, `ordinals` places in the segment, `counts` from 1 to 255.
    """

    words: Words
    ordinals: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


def weights_of(
    counts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], mean_length: float
) -> npt.NDArray[np.float64]:
    """Return each word's part in the score, between 0 and K1 + 1, before idf."""
    weights: npt.NDArray[np.float64] = counts * (K1 + 1) / (counts + _saturation(lengths, mean_length))
    return weights


def _saturation(lengths: npt.NDArray[np.int64], mean_length: float) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = lengths.astype(np.float64) / max(mean_length, 1.0)
    return K1 * (1 - B + B * shares)


def idf(chunks: int, df: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the weight of words that stand in `df` of so many chunks."""
    found = np.minimum(df, chunks)
    value: npt.NDArray[np.float64] = np.log1p((chunks - found + 0.5) / (found + 0.5))
    return value


def pack(postings: Postings, lengths: npt.NDArray[np.int64], mean_length: float) -> Iterator[Page]:
    """Yield the pages of a segment, by word.

    `lengths` are those of its chunks, by ordinal.
    """
    exact = weights_of(postings.counts, lengths[postings.ordinals], mean_length)
    quantised = np.clip(np.rint(exact / _STEP), 1, 255).astype(np.uint8)
    order = np.lexsort((postings.ordinals, postings.words))
    words, starts, counts = np.unique(postings.words[order], return_index=True, return_counts=True)
    ordinals, weights = postings.ordinals[order].astype(np.uint16), quantised[order]
    dense_from = max(len(lengths) * _DENSE_SHARE, _PAGE_BYTES / 3)
    waiting, room = 0, _PAGE_BYTES
    for place, count in enumerate(counts.tolist()):
        size = 12 + 3 * count
        if size > room and place > waiting:
            yield _list_page(words, starts, counts, ordinals, weights, slice(waiting, place))
            waiting, room = place, _PAGE_BYTES
        if count > dense_from:
            every = np.zeros(len(lengths), dtype=np.uint8)
            start = int(starts[place])
            every[ordinals[start : start + count]] = weights[start : start + count]
            word = int(words[place])
            yield Page(word, word, _HEADER.pack(1, _DENSE) + words[place].tobytes() + every.tobytes())
            waiting, room = place + 1, _PAGE_BYTES
        else:
            room -= size
    if waiting < len(words):
        yield _list_page(words, starts, counts, ordinals, weights, slice(waiting, len(words)))


def _list_page(
    words: Words,
    starts: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    ordinals: Ordinals,
    weights: Weights,
    places: slice,
) -> Page:
    begin, end = int(starts[places.start]), int(starts[places.stop - 1] + counts[places.stop - 1])
    listed = words[places]
    data = b"".join((
        _HEADER.pack(len(listed), _LIST), listed.astype("<i8").tobytes(), counts[places].astype("<u4").tobytes(),
        ordinals[begin:end].astype("<u2").tobytes(), weights[begin:end].tobytes(),
    ))  # fmt: skip
    return Page(int(listed[0]), int(listed[-1]), data)


class _Opened(NamedTuple):
    """A page's arrays; `counts` is None of a page that has a weight for each chunk."""

    words: Words
    counts: npt.NDArray[np.uint32] | None
    ordinals: Ordinals
    weights: Weights


def _open(data: bytes) -> _Opened:
    number, kind = _HEADER.unpack_from(data)
    words = np.frombuffer(data, dtype="<i8", count=number, offset=_HEADER.size)
    offset = _HEADER.size + 8 * number
    if kind == _DENSE:
        return _Opened(words, None, np.empty(0, dtype=np.uint16), np.frombuffer(data, dtype=np.uint8, offset=offset))
    counts = np.frombuffer(data, dtype="<u4", count=number, offset=offset)
    total, offset = int(counts.sum()), offset + 4 * number
    ordinals = np.frombuffer(data, dtype="<u2", count=total, offset=offset)
    return _Opened(words, counts, ordinals, np.frombuffer(data, dtype=np.uint8, count=total, offset=offset + 2 * total))


def unpack(pages: Sequence[bytes], lengths: npt.NDArray[np.int64], mean_length: float) -> Postings:
    """Return what was packed with these lengths.

    Counts come back exactly as long as the steps of the weights tell them apart. That is up to 7 in a short chunk, about
    15 in one of usual length; higher ones come back nearly.
    """
    parts: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]] = []
    for data in pages:
        page = _open(data)
        if page.counts is None:
            ordinals = np.flatnonzero(page.weights)
            parts.append((np.repeat(page.words, len(ordinals)), ordinals, page.weights[ordinals]))
        else:
            parts.append((np.repeat(page.words, page.counts), page.ordinals, page.weights))
    if not parts:
        return Postings(*(np.empty(0, dtype=np.int64) for _ in range(3)))
    words, places, steps = (np.concatenate(column) for column in zip(*parts, strict=True))
    ordinals = places.astype(np.int64)
    weights = np.minimum(steps * _STEP, K1 + 1 - _STEP / 2)
    counts = weights * _saturation(lengths[ordinals], mean_length) / (K1 + 1 - weights)
    return Postings(words.astype(np.int64), ordinals, np.clip(np.rint(counts), 1, MAX_COUNT).astype(np.int64))


class WordList(NamedTuple):
    """The chunks of a segment that have a word, and its weight in each.

    `ordinals` is None if `weights` has one for each chunk.
    """

    ordinals: Ordinals | None
    weights: Weights

    @property
    def chunk_count(self) -> int:
        """Return the number of chunks that have the word."""
        return int(np.count_nonzero(self.weights)) if self.ordinals is None else len(self.weights)


def find(data: bytes, word: int) -> WordList | None:
    """Return the list of a word in a page, None if it is not there."""
    page = _open(data)
    place = int(np.searchsorted(page.words, word))
    if place == len(page.words) or page.words[place] != word:
        return None
    if page.counts is None:
        return WordList(None, page.weights)
    begin = int(page.counts[:place].sum())
    end = begin + int(page.counts[place])
    return WordList(page.ordinals[begin:end], page.weights[begin:end])


def add_scores(scores: npt.NDArray[np.float32], found: WordList, factor: float) -> None:
    """Add a word's part to the scores of a segment's chunks."""
    parts = found.weights.astype(np.float32)
    parts *= np.float32(factor * _STEP)
    if found.ordinals is None:
        scores += parts
    else:
        # Each ordinal stands in a list once, so a plain addition loses nothing; np.add.at takes five times as long.
        scores[found.ordinals.astype(np.intp)] += parts


@dataclass(frozen=True)
class Entries:
    """The words of chunks that are in no segment yet, one chunk after the other.

    `numbers` has the number of different words of each chunk.
    """

    chunk_ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    words: Words
    counts: npt.NDArray[np.uint8]

    @classmethod
    def from_bytes(cls, heads: bytes, words: bytes, counts: bytes) -> Entries:
        """Return entries as the database joins them.

        `heads` are (chunk_id int8, length int4, number of words int4), big-endian. `words` are int8, `counts` one byte
        each.
        """
        head = np.frombuffer(heads, dtype=[("chunk_id", ">i8"), ("length", ">i4"), ("words", ">i4")])
        ids, lengths, numbers = (head[name].astype(np.int64) for name in ("chunk_id", "length", "words"))
        hashes = np.frombuffer(words, dtype=">i8").astype(np.int64)
        return cls(ids, lengths, numbers, hashes, np.frombuffer(counts, dtype=np.uint8))

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """Return the chunk of each word, as a place in `chunk_ids`."""
        return np.repeat(np.arange(len(self.numbers)), self.numbers)

    def matching(self, asked: Words) -> EntryMatches:
        """Return where the words of a query stand, all of them different."""
        order = np.argsort(asked)
        ordered = asked[order]
        # The lowest byte rules out nearly all words, so few of them are looked up.
        is_possible = np.zeros(256, dtype=bool)
        is_possible[asked.astype(np.uint8)] = True
        candidates = np.flatnonzero(is_possible[self.words.astype(np.uint8)])
        place = np.minimum(np.searchsorted(ordered, self.words[candidates]), len(ordered) - 1)
        hit = ordered[place] == self.words[candidates]
        found = candidates[hit]
        chunks = np.searchsorted(np.cumsum(self.numbers), found, side="right")
        return EntryMatches(self, order[place[hit]], chunks, self.counts[found].astype(np.int64))


@dataclass(frozen=True)
class EntryMatches:
    """The words of a query in entries: arrays of one length.

    `asked` are places in the query's words, `chunks` places in the entries' chunks.
    """

    entries: Entries
    asked: npt.NDArray[np.int64]
    chunks: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    def frequencies(self, words: int) -> npt.NDArray[np.int64]:
        """Return in how many chunks each of so many words of the query stands."""
        tally: npt.NDArray[np.int64] = np.bincount(self.asked, minlength=words).astype(np.int64)
        return tally

    def scores(self, factors: npt.NDArray[np.float64], mean_length: float) -> npt.NDArray[np.float32]:
        """Return the score of each chunk; `factors` are n * idf of the query's words."""
        parts = weights_of(self.counts, self.entries.lengths[self.chunks], mean_length) * factors[self.asked]
        summed = np.bincount(self.chunks, weights=parts, minlength=len(self.entries.chunk_ids))
        return summed.astype(np.float32)
