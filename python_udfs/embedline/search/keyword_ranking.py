"""Rank the chunks of a version by keywords (BM25).

One statement reads the pages of the query's words and the entries that are in no segment yet. The scores of all chunks are
added up here. A second statement fetches the best chunks with their source rows, with the caller's rights. It is asked for
more as long as chunks are gone or hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedline.catalog.values import Pipeline
from embedline.core.text import repair_text
from embedline.errors import NotReady
from embedline.keywords import postings
from embedline.keywords.build import built_share
from embedline.keywords.postings import Entries, WordList
from embedline.postgres.session import Session
from embedline.search.filters import FilteredRows
from embedline.search.held_postings import take_postings

Row = dict[str, Any]

# Different words of a query that are ranked: the first ones. More of them are a document, not a query.
_MOST_WORDS = 128
# Postings that one ranking reads: 10 ns each. Beyond that the words that stand in most chunks are left out; they say least.
_MOST_POSTINGS = 8_000_000
# Factor by which more chunks are fetched when too few are shown, and its end.
_MORE, _MOST = 8, 500_000
_SPARE = 10
# Tries to read, if segments are packed again meanwhile.
_TRIES = 5
_SHOWN_TYPES = ["bigint[]", "integer[]", "double precision[]", "bigint[]", "double precision[]"]
# Digits to which equal scores agree: the weights have steps of 0.0086.
_DIGITS = 4


@dataclass(frozen=True)
class _Segment:
    """A segment, as a ranking sees it."""

    segment_id: int
    chunks: int
    lists: dict[int, WordList]


class KeywordRanker:
    """Rank one version by the words of queries."""

    def __init__(self, session: Session, pipeline: Pipeline, filtered: FilteredRows | None = None) -> None:
        """Prepare for a version, and for what a filter lets through.

        The caller has asked for a complete index (require_index).
        """
        self._session, self._pipeline, self._filtered = session, pipeline, filtered

    def nearest(self, query: str, k: int) -> list[Row]:
        """Return the k best chunks, fewer if fewer have a word of the query.

        Rows are of chunk_id, key, chunk, chunk_start, chunk_end, score.
        """
        words = self._words(query)
        if not words:
            return []
        for _ in range(_TRIES):
            scores = self._scores(words)
            rows = self._show(scores, k)
            if rows is not None:
                return rows
        raise NotReady("the keyword index is packed again all the time", hint="Run the search again.")

    def _words(self, query: str) -> dict[int, int]:
        """Return how often the query has each of its words."""
        row = self._session.query(
            f"SELECT words, counts FROM {self._pipeline.search_function('keyword_terms')}($1)",
            ["text"],
            repair_text(query),
        )[0]
        words = np.frombuffer(row["words"], dtype=">i8").tolist()
        return dict(list(zip(words, row["counts"], strict=True))[:_MOST_WORDS])

    def _scores(self, words: dict[int, int]) -> _Scores:
        read_words = f"SELECT {self._pipeline.search_function('keyword_read')}($1)"
        rows = take_postings(self._session, self._session.scalar(read_words, ["bigint[]"], list(words)))
        head = next(row for row in rows if row["segment_id"] is None)
        heads = {row["segment_id"]: row for row in rows if row["segment_id"] is not None and row["word"] is None}
        lists: dict[int, dict[int, WordList]] = {segment_id: {} for segment_id in heads}
        for row in rows:
            if row["word"] is not None and (found := postings.find(row["postings"], row["word"])) is not None:
                lists[row["segment_id"]][row["word"]] = found
        segments = [_Segment(i, heads[i]["chunk_count"], lists[i]) for i in sorted(heads)]
        entries = Entries.from_bytes(head["heads"] or b"", head["postings"] or b"", head["counts"] or b"")
        matches = entries.matching(np.array(list(words), dtype=np.int64))
        read = np.array([sum(s.lists[w].chunk_count for s in segments if w in s.lists) for w in words], dtype=np.int64)
        chunks = head["chunk_count"] + sum(segment.chunks for segment in segments)
        length = (head["total_length"] or 0) + sum(row["total_length"] for row in heads.values())
        factors = postings.idf(chunks, read + matches.frequencies(len(words))) * np.array(list(words.values()))
        factors[~_within_bounds(read, factors)] = 0
        factor_of = dict(zip(words, factors.tolist(), strict=True))
        of_segments = []
        for segment in segments:
            scores = np.zeros(segment.chunks, dtype=np.float32)
            for word, found in segment.lists.items():
                if factor_of[word] > 0:
                    postings.add_scores(scores, found, factor_of[word])
            of_segments.append(scores)
        of_entries = matches.scores(factors, length / max(chunks, 1))
        return _Scores([s.segment_id for s in segments], of_segments, entries.chunk_ids, of_entries)

    def _show(self, scores: _Scores, k: int) -> list[Row] | None:
        """Return the best chunks that are shown; None if a segment is gone meanwhile."""
        limit = k + _SPARE
        while True:
            best = scores.best(limit)
            ask = self._session.query if self._filtered is None else self._filtered.run
            rows = ask(self.statement(), _SHOWN_TYPES, *best.values())
            if best.segments and not self._are_there(best.segments):
                return None
            if len(rows) >= k or best.is_all or limit >= _MOST:
                ordered = sorted(
                    rows, key=lambda row: (-round(row["score"], _DIGITS), str(row["key"]), row["chunk_id"])
                )
                return ordered[:k]
            limit *= _MORE

    def statement(self) -> str:
        """Return the query for the chunks of a ranking; $1 to $5 are its values."""
        shown = f"SELECT r.* FROM {self._pipeline.search_function('keyword_shown')}($1, $2, $3, $4, $5) AS r"
        return shown if self._filtered is None else f"{shown} WHERE {self._filtered.lets_through('r.chunk_id')}"

    def statement_with_values(self, query: str, k: int) -> tuple[str, list[str], list[object]]:
        """Return the query for the k best chunks with its parameters."""
        words = self._words(query)
        best = self._scores(words).best(k + _SPARE) if words else _Best([], [], [], [], [], is_all=True)
        return self.statement(), _SHOWN_TYPES, list(best.values())

    def _are_there(self, segments: Sequence[int]) -> bool:
        rows = self._session.query(
            f"SELECT s AS number FROM {self._pipeline.search_function('keyword_segments')}() AS s"
        )
        return set(segments) <= {row["number"] for row in rows}


def require_index(session: Session, pipeline: Pipeline) -> None:
    """Raise NotReady unless the version's chunks are indexed by keywords."""
    if pipeline.keyword is None:
        raise NotReady(
            f'pipeline "{pipeline.name}" has no keyword index',
            hint=f"SELECT embedline.alter_pipeline('{pipeline.name}', keyword => 'english'); creates one.",
        )
    share = built_share(session, pipeline)
    if share < 1:
        raise NotReady(
            f'the keyword index of pipeline "{pipeline.name}" is not complete: {share:.0%} of the chunks are in it',
            hint="Workers build it: SELECT * FROM embedline.progress; shows how far it is.",
        )


def _within_bounds(read: npt.NDArray[np.int64], factors: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which of the words are ranked, the rarest first.

    `read` are the postings of each in segments.
    """
    order = np.argsort(-factors, kind="stable")
    kept = np.empty(len(read), dtype=bool)
    kept[order] = np.cumsum(read[order]) <= _MOST_POSTINGS
    kept[order[0]] = True
    return kept


@dataclass(frozen=True)
class _Best:
    """The best chunks: places in segments, and chunks that are in none."""

    segments: list[int]
    ordinals: list[int]
    segment_scores: list[float]
    chunks: list[int]
    chunk_scores: list[float]
    is_all: bool

    def values(self) -> tuple[list[int], list[int], list[float], list[int], list[float]]:
        """Return the parameters of keyword_shown."""
        return self.segments, self.ordinals, self.segment_scores, self.chunks, self.chunk_scores


@dataclass(frozen=True)
class _Scores:
    """The scores of all chunks, by segment."""

    segment_ids: list[int]
    of_segments: list[npt.NDArray[np.float32]]
    chunk_ids: npt.NDArray[np.int64]
    of_entries: npt.NDArray[np.float32]

    def best(self, limit: int) -> _Best:
        """Return the `limit` best chunks."""
        parts = [*self.of_segments, self.of_entries]
        least, places, values, is_all = np.float32(0), [], [], True
        for scores in parts:
            found = np.flatnonzero(scores > least)
            if len(found) > limit:
                is_all = False
                kept = np.argpartition(scores[found], len(found) - limit)[-limit:]
                found = found[kept]
                # The worst of so many: what is not better elsewhere is not among the best.
                least = max(least, np.nextafter(scores[found].min(), np.float32(0)))
            places.append(found)
            values.append(scores[found])
        total = sum(map(len, places))
        if total > limit:
            is_all = False
            ordered = np.partition(np.concatenate(values), total - limit)
            bar = ordered[total - limit]
            keep = [value >= bar for value in values]
            places = [place[k] for place, k in zip(places, keep, strict=True)]
            values = [value[k] for value, k in zip(values, keep, strict=True)]
        of_segments = list(zip(self.segment_ids, places[:-1], values[:-1], strict=True))
        return _Best(
            [i for i, place, _ in of_segments for _ in range(len(place))],
            [ordinal for _, place, _ in of_segments for ordinal in place.tolist()],
            [score for _, _, value in of_segments for score in value.tolist()],
            self.chunk_ids[places[-1]].tolist(),
            values[-1].tolist(),
            is_all,
        )
