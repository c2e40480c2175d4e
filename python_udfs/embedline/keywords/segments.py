"""Pack entries into segments, and small or outdated segments into larger ones.

One session at a time packs a chunk set. Readers and writers of entries never wait for it: entries are only added, and a
search reads entries and segments in one snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedline.catalog.values import Pipeline
from embedline.keywords import postings
from embedline.keywords.postings import MAX_CHUNKS, Entries, Postings
from embedline.postgres.locks import KEYWORD_LOCK_CLASS
from embedline.postgres.session import Session

# Entries that are packed at least. Each search reads those that wait.
LEAST_ENTRIES = 1024
# Segments of fewer chunks than the first number are packed together once there are as many as the second. They have 1,024
# chunks, then some 16,000, then 65,536. So each word is written three times.
_TIERS = ((MAX_CHUNKS // 8, 8), (MAX_CHUNKS * 3 // 4, 4))
# A segment is packed again if more of its chunks are gone than this, or the mean length has changed by more.
_GONE_SHARE, _LENGTH_SHARE = 0.2, 0.1


@dataclass(frozen=True)
class _Chunks:
    """Chunks to pack: their ids in order, their lengths and their words."""

    ids: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    postings: Postings

    def only(self, kept: npt.NDArray[np.bool_]) -> _Chunks:
        """Return these of the chunks."""
        if kept.all():
            return self
        places = np.cumsum(kept) - 1
        stays = kept[self.postings.ordinals]
        words = Postings(
            self.postings.words[stays], places[self.postings.ordinals[stays]], self.postings.counts[stays]
        )  # fmt: skip
        return _Chunks(self.ids[kept], self.lengths[kept], words)


def _joined(parts: Sequence[_Chunks]) -> _Chunks:
    """Return the chunks of several in one, in the order of their ids."""
    ids = np.concatenate([part.ids for part in parts])
    order = np.argsort(ids, kind="stable")
    rank = np.empty(len(ids), dtype=np.int64)
    rank[order] = np.arange(len(ids))
    starts = np.cumsum([0, *(len(part.ids) for part in parts[:-1])])
    ordinals = [rank[part.postings.ordinals + start] for part, start in zip(parts, starts, strict=True)]
    words = Postings(
        np.concatenate([part.postings.words for part in parts]),
        np.concatenate(ordinals),
        np.concatenate([part.postings.counts for part in parts]),
    )
    return _Chunks(ids[order], np.concatenate([part.lengths for part in parts])[order], words)


# Key in GD of the number of entries that this session has written to a table since it was packed.
_WRITTEN = "embedline.keyword_entries "


def pack_when_many(session: Session, pipeline: Pipeline, chunk_set: int, written: int) -> None:
    """Pack entries once this session has written enough of them."""
    key = _WRITTEN + pipeline.keyword_table("entry", chunk_set)
    count = session.cache[key] = session.cache.get(key, 0) + written
    if count >= LEAST_ENTRIES:
        packing = Packing(session, pipeline, chunk_set)
        if packing.pack():
            packing.merge()


class Packing:
    """The packing of one chunk set of a pipeline."""

    def __init__(self, session: Session, pipeline: Pipeline, chunk_set: int) -> None:
        self._session, self._pipeline = session, pipeline
        self._chunk_set = chunk_set
        self._chunk = pipeline.chunk_table(chunk_set)
        self._entry, self._segment, self._page = (
            pipeline.keyword_table(part, chunk_set) for part in ("entry", "segment", "page")
        )

    def pack(self, least: int = LEAST_ENTRIES) -> bool:
        """Pack waiting entries, if there are `least`; return True if that was done."""
        if not self._has_entries(least) or not self._lock():
            return False
        self._session.cache.pop(_WRITTEN + self._entry, None)
        row = self._session.query(
            f"""
            SELECT string_agg(e.head, ''::bytea) AS heads,
                string_agg(e.words, ''::bytea) AS words, string_agg(e.counts, ''::bytea) AS counts
            FROM (SELECT * FROM {self._entry} ORDER BY chunk_id LIMIT {MAX_CHUNKS} FOR UPDATE SKIP LOCKED) AS e
            """
        )[0]
        if row["heads"] is None:
            return False
        entries = Entries.from_bytes(row["heads"], row["words"], row["counts"])
        found = _Chunks(
            entries.chunk_ids, entries.lengths, Postings(entries.words, entries.places, entries.counts.astype(np.int64))
        )
        self._write(found.only(self._exist(found.ids)), self.mean_length())
        self._session.query(
            f"DELETE FROM {self._entry} WHERE chunk_id = ANY ($1)", ["bigint[]"], entries.chunk_ids.tolist()
        )
        return True

    def merge(self) -> bool:
        """Pack small segments into larger ones; return True if there were enough."""
        small = self._session.query(
            f"SELECT segment_id, chunk_count FROM {self._segment} WHERE chunk_count < $1 ORDER BY chunk_count",
            ["integer"],
            _TIERS[-1][0],
        )
        has_merged, least = False, 0
        for most, count in _TIERS:
            total, chosen = 0, []
            for row in small:
                total += row["chunk_count"] if least <= row["chunk_count"] < most else 0
                if least <= row["chunk_count"] < most and total <= MAX_CHUNKS:
                    chosen.append(row["segment_id"])
            if len(chosen) >= count and self._lock():
                has_merged = self._pack_again(chosen) or has_merged
            least = most
        return has_merged

    def pack_outdated(self) -> int:
        """Pack segments again that have lost many chunks or have old weights.

        Return the number of segments. Reads the ids of all segments, so it is for the night.
        """
        if not self._lock():
            return 0
        mean = self.mean_length()
        outdated = []
        for row in self._session.query(f"SELECT segment_id, mean_length FROM {self._segment} ORDER BY segment_id"):
            ids = self._ids(row["segment_id"])
            gone = 1 - np.count_nonzero(self._exist(ids)) / max(len(ids), 1)
            if gone > _GONE_SHARE or abs(row["mean_length"] / mean - 1) > _LENGTH_SHARE:
                outdated.append(row["segment_id"])
        for segment_id in outdated:
            self._pack_again([segment_id])
        return len(outdated)

    def clear(self) -> None:
        """Remove all segments and entries."""
        self._session.execute(f"TRUNCATE {self._entry}, {self._segment}, {self._page}")

    def missing(self) -> list[int]:
        """Return the chunks without an entry that are in no segment."""
        indexed = np.concatenate([
            np.empty(0, dtype=np.int64),
            *(
                self._ids(row["segment_id"])
                for row in self._session.query(f"SELECT segment_id FROM {self._segment} ORDER BY segment_id")
            ),
        ])  # fmt: skip
        stored = self._session.scalar(
            f"""
            SELECT string_agg(int8send(c.chunk_id), ''::bytea) FROM {self._chunk} AS c
            WHERE NOT EXISTS (SELECT FROM {self._entry} AS e WHERE e.chunk_id = c.chunk_id)
            """
        )
        chunks = np.frombuffer(stored or b"", dtype=">i8").astype(np.int64)
        lacking: list[int] = chunks[~np.isin(chunks, indexed)].tolist()
        return lacking

    def mean_length(self) -> float:
        """Return the mean length of the chunks of all segments and entries."""
        row = self._session.query(
            f"""
            SELECT sum(n.chunks)::bigint AS chunks, sum(n.length)::bigint AS length FROM (
                SELECT sum(s.chunk_count) AS chunks, sum(s.total_length) AS length FROM {self._segment} AS s
                UNION ALL SELECT count(*), sum(e.length) FROM {self._entry} AS e) AS n
            """
        )[0]
        return max(float(row["length"] or 0) / max(float(row["chunks"] or 0), 1.0), 1.0)

    def _pack_again(self, segment_ids: Sequence[int]) -> bool:
        parts = [part for part in map(self._read, segment_ids) if part is not None]
        if not parts:
            return False
        joined, mean = _joined(parts), self.mean_length()
        self._session.query(f"DELETE FROM {self._page} WHERE segment_id = ANY ($1)", ["bigint[]"], list(segment_ids))
        self._session.query(f"DELETE FROM {self._segment} WHERE segment_id = ANY ($1)", ["bigint[]"], list(segment_ids))
        self._write(joined.only(self._exist(joined.ids)), mean)
        return True

    def _write(self, chunks: _Chunks, mean_length: float) -> None:
        """Write a segment with its pages; of no chunks, nothing.

        `mean_length` is that of all chunks.
        """
        if not len(chunks.ids):
            return
        total = int(chunks.lengths.sum())
        segment_id = self._session.scalar(
            f"""
            INSERT INTO {self._segment} (chunk_count, total_length, mean_length, chunk_ids, lengths)
            VALUES ($1, $2, $3, $4, $5) RETURNING segment_id
            """,
            ["integer", "bigint", "real", "bytea", "bytea"],
            len(chunks.ids), total, mean_length, chunks.ids.astype(">i8").tobytes(), chunks.lengths.astype(">i4").tobytes(),
        )  # fmt: skip
        pages = list(postings.pack(chunks.postings, chunks.lengths, float(np.float32(mean_length))))
        self._session.query(
            f"""
            INSERT INTO {self._page} (segment_id, first_word, last_word, postings)
            SELECT $1, p.* FROM unnest($2::bigint[], $3::bigint[], $4::bytea[]) AS p
            """,
            ["bigint", "bigint[]", "bigint[]", "bytea[]"],
            segment_id, [page.first for page in pages], [page.last for page in pages], [page.data for page in pages],
        )  # fmt: skip

    def _read(self, segment_id: int) -> _Chunks | None:
        rows = self._session.query(
            f"SELECT mean_length, chunk_ids, lengths FROM {self._segment} WHERE segment_id = $1", ["bigint"], segment_id
        )
        if not rows:
            return None
        lengths = np.frombuffer(rows[0]["lengths"], dtype=">i4").astype(np.int64)
        pages = self._session.query(
            f"SELECT postings FROM {self._page} WHERE segment_id = $1 ORDER BY first_word", ["bigint"], segment_id
        )
        unpacked = postings.unpack([row["postings"] for row in pages], lengths, rows[0]["mean_length"])
        return _Chunks(np.frombuffer(rows[0]["chunk_ids"], dtype=">i8").astype(np.int64), lengths, unpacked)

    def _ids(self, segment_id: int) -> npt.NDArray[np.int64]:
        found = self._session.scalar(
            f"SELECT chunk_ids FROM {self._segment} WHERE segment_id = $1", ["bigint"], segment_id
        )
        return np.frombuffer(found or b"", dtype=">i8").astype(np.int64)

    def _exist(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of the chunks are still stored."""
        found = self._session.scalar(
            f"""
            SELECT string_agg(int8send(c.chunk_id), ''::bytea) FROM {self._chunk} AS c
            JOIN unnest($1::bigint[]) AS i (chunk_id) ON i.chunk_id = c.chunk_id
            """,
            ["bigint[]"],
            ids.tolist(),
        )
        exist: npt.NDArray[np.bool_] = np.isin(ids, np.frombuffer(found or b"", dtype=">i8").astype(np.int64))
        return exist

    def _has_entries(self, least: int) -> bool:
        query = f"SELECT count(*) FROM (SELECT FROM {self._entry} LIMIT $1) AS e"
        return bool(self._session.scalar(query, ["bigint"], least) >= least)

    def _lock(self) -> bool:
        """Lock the segments for this transaction; return False if another has them.

        A transaction with an older snapshot would pack again what another one has packed, so it does nothing.
        """
        return bool(
            self._session.scalar(
                "SELECT current_setting('transaction_isolation') = 'read committed'"
                " AND pg_try_advisory_xact_lock($1, hashtext($2))",
                ["integer", "text"], KEYWORD_LOCK_CLASS, self._segment,
            )
        )  # fmt: skip
