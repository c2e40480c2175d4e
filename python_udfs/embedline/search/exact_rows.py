"""Choose the rows that are ranked exactly beside a version's index.

They are new rows, and rows far from all others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedline.catalog.load import load_versions
from embedline.catalog.values import Pipeline
from embedline.core import names, vectors
from embedline.core.sql_text import quote_ident
from embedline.core.vectors import FloatMatrix
from embedline.indexes import lists
from embedline.indexes.definitions import EF_CONSTRUCTION, own_index
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.search.exact_ranking import distances

# Vectors that stand for all of a version, and the rank of the similarity that measures a vector's distance from them.
_SAMPLE, _RANK = 1000, 10
# Share of the farthest rows that every search ranks exactly, and the bytes of vectors at most (2 ms).
_FAR_SHARE, _FAR_BYTES = 0.03, 4_000_000
# Vectors scored at a time, and the seconds that one call of `advance` may take.
_PAGE, _SECONDS = 2000, 0.5
# A row counts as unreachable if exact ranking puts it among this many first rows and search does not find it.
FIRST = 3
# Share of such rows above which the index is worth building again.
POOR_SHARE = 0.05
# Tells if a check has something to do, without a lock or a write. $1 is the version.
_IS_DUE = """
    SELECT r.version_id IS NULL OR r.pending_to IS NOT NULL
        OR r.checked_to < (SELECT max(v.chunk_id) FROM {vectors} AS v)
        OR EXISTS (SELECT FROM {exact} AS e WHERE e.similarity IS NULL
            OR NOT EXISTS (SELECT FROM {vectors} AS v WHERE v.chunk_id = e.chunk_id)) AS is_due
    FROM (SELECT $1 AS version_id) AS asked LEFT JOIN embedline.index_reach AS r ON r.version_id = asked.version_id
"""
_LOCKED = """
    SELECT checked_to, pending_to, pending_writers, pending_xact = pg_current_xact_id() AS is_own
    FROM embedline.index_reach WHERE version_id = $1 FOR UPDATE SKIP LOCKED
"""
_FIX = """
    UPDATE embedline.index_reach SET pending_to = $2, pending_xact = pg_current_xact_id(), pending_writers = NULL
    WHERE version_id = $1
"""
# Transactions that hold the lock of a writer on the version's table.
_WRITERS = """
    SELECT coalesce(array_agg(DISTINCT l.virtualtransaction), '{}') AS writers FROM pg_locks AS l
    WHERE l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
        AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
        AND l.relation = (SELECT c.oid FROM pg_class AS c WHERE c.relname = $1
                          AND c.relnamespace = 'embedline_data'::regnamespace)
"""


def maintain(session: Session, pipeline: Pipeline) -> None:
    """Check the rows written since the last check, in each indexed version.

    Workers call it every few seconds. It takes half a second for each version at most, and no lock that a writer waits
    for.
    """
    several = len(pipeline.versions) > 1
    for version in load_versions(session, pipeline.name) if several else [pipeline]:
        if version.version.has_index:
            advance(session, version)


def advance(session: Session, pipeline: Pipeline, seconds: float = _SECONDS) -> bool:
    """Check new rows of a version, keep far ones; return True if all are checked.

    It also moves `checked_to` on. Chunk ids grow, but a transaction that took lower ones may commit later. So one call
    fixes the end of a check. A later one notes the transactions that are writing then, and the check begins when these
    have ended.
    """
    version_id = pipeline.version.version_id
    due = _IS_DUE.format(vectors=pipeline.vectors, exact=pipeline.exact)
    if not session.scalar(due, ["bigint"], version_id):
        return True
    session.query(
        "INSERT INTO embedline.index_reach (version_id) VALUES ($1) ON CONFLICT DO NOTHING", ["bigint"], version_id
    )
    rows = session.query(_LOCKED, ["bigint"], version_id)
    if not rows:
        return False  # Another worker is at it.
    checked_to, pending_to = int(rows[0]["checked_to"]), rows[0]["pending_to"]
    _forget_absent(session, pipeline)
    if pending_to is None:
        newest = int(session.scalar(f"SELECT coalesce(max(chunk_id), 0) FROM {pipeline.vectors}"))
        if newest <= checked_to:
            _look_again(session, pipeline)
            return True
        session.query(_FIX, ["bigint", "bigint"], version_id, newest)
        return False
    if rows[0]["is_own"]:
        return False  # Who writes behind the check has to see pending_to, so it must be committed first.
    writing = set(session.scalar(_WRITERS, ["name"], names.of_version(pipeline.name, pipeline.version.number)))
    if rows[0]["pending_writers"] is None and writing:
        session.query(
            "UPDATE embedline.index_reach SET pending_writers = $2 WHERE version_id = $1",
            ["bigint", "text[]"], version_id, sorted(writing),
        )  # fmt: skip
        return False
    if writing & set(rows[0]["pending_writers"] or ()):
        return False
    reached = _check(session, pipeline, checked_to, int(pending_to), time.monotonic() + seconds)
    is_through = reached >= int(pending_to)
    session.query(
        "UPDATE embedline.index_reach SET checked_to = $2, pending_to = $3, pending_writers = $4 WHERE version_id = $1",
        ["bigint", "bigint", "bigint", "text[]"],
        version_id, reached, None if is_through else pending_to, None if is_through else [],
    )  # fmt: skip
    return False


@dataclass(frozen=True)
class _Yardstick:
    """A sample of a version's vectors, and the similarity below which a vector is far."""

    sample: FloatMatrix
    far: float
    distance: str

    def similarities(self, matrix: FloatMatrix) -> npt.NDArray[np.float64]:
        """Return the tenth best similarity of each row to the sample, shape (rows,)."""
        return tenth_best(matrix, self.sample, self.distance)


def tenth_best(
    matrix: FloatMatrix, sample: FloatMatrix, distance: str, *, is_itself: bool = False
) -> npt.NDArray[np.float64]:
    """Return the tenth best similarity of each row to the sample.

    If `is_itself`, the rows are the sample and leave themselves out.
    """
    if distance == "l2":
        near = -distances(matrix, sample, "l2")
    else:
        near = (vectors.normalise(matrix) @ vectors.normalise(sample).T).astype(np.float64)
    if is_itself:
        np.fill_diagonal(near, -np.inf)
    rank = min(_RANK, near.shape[1])
    tenth: npt.NDArray[np.float64] = np.partition(near, near.shape[1] - rank, axis=1)[:, near.shape[1] - rank]
    return tenth


def _yardstick(session: Session, pipeline: Pipeline) -> _Yardstick | None:
    """Return the measure of a far vector in a version now.

    None for a version of a few rows, which are all ranked exactly anyway.
    """
    sample = sample_vectors(session, pipeline, _SAMPLE)
    if len(sample) <= _RANK:
        return None
    distance = pipeline.version.distance
    own = tenth_best(sample, sample, distance, is_itself=True)
    share = min(_FAR_SHARE, _most_exact(pipeline) / max(lists.row_count(session, pipeline), 1))
    return _Yardstick(sample, float(np.quantile(own, share)), distance)


def _most_exact(pipeline: Pipeline) -> int:
    return max(100, _FAR_BYTES // (4 * pipeline.version.dimensions))


def random_chunks(pipeline: Pipeline) -> str:
    """Return the CTE `picked` of up to $1 random chunk ids of the version.

    They are found through the primary key, at the same cost on any table.
    """
    return f"""
        target AS MATERIALIZED (
            SELECT b.low + floor(random() * (b.high - b.low + 1))::bigint AS chunk_id
            FROM (SELECT min(chunk_id) AS low, max(chunk_id) AS high FROM {pipeline.vectors}) AS b
            CROSS JOIN generate_series(1, $1)
        ), picked AS MATERIALIZED (
            SELECT DISTINCT p.chunk_id FROM target AS t CROSS JOIN LATERAL (
                SELECT v.chunk_id FROM {pipeline.vectors} AS v WHERE v.chunk_id >= t.chunk_id ORDER BY v.chunk_id LIMIT 1
            ) AS p
        )
    """


def sample_vectors(session: Session, pipeline: Pipeline, count: int) -> FloatMatrix:
    """Return up to `count` random vectors of the version, shape (rows, dimensions).

    They are found through the primary key.
    """
    version = pipeline.version
    rows = session.query(
        f"""
        WITH {random_chunks(pipeline)}
        SELECT {vector_schema(session)}.{version.column_type}_send(v.{quote_ident(version.column)}) AS vector
        FROM picked AS p JOIN {pipeline.vectors} AS v ON v.chunk_id = p.chunk_id ORDER BY random()
        """,
        ["integer"],
        count,
    )
    if not rows:
        return np.zeros((0, version.dimensions), dtype=np.float32)
    return vectors.vectors_from_send([row["vector"] for row in rows], version.column_type)


def _check(session: Session, pipeline: Pipeline, after: int, until: int, deadline: float) -> int:
    """Score the rows after one chunk and up to another, and keep the far ones.

    Returns the last chunk that was scored.
    """
    yardstick = _yardstick(session, pipeline)
    _look_again(session, pipeline, yardstick)
    if yardstick is None:
        return until
    column = quote_ident(pipeline.version.column)
    sent = f"{vector_schema(session)}.{pipeline.version.column_type}_send(v.{column})"
    while after < until and time.monotonic() < deadline:
        rows = session.query(
            f"SELECT v.chunk_id, {sent} AS vector FROM {pipeline.vectors} AS v"
            " WHERE v.chunk_id > $1 AND v.chunk_id <= $2 ORDER BY v.chunk_id LIMIT $3",
            ["bigint", "bigint", "bigint"], after, until, _PAGE,
        )  # fmt: skip
        if not rows:
            after = until
            break
        scores = yardstick.similarities(
            vectors.vectors_from_send([row["vector"] for row in rows], pipeline.version.column_type)
        )
        far = np.flatnonzero(scores < yardstick.far)
        keep_exact(session, pipeline, [int(rows[i]["chunk_id"]) for i in far], [float(scores[i]) for i in far])
        after = int(rows[-1]["chunk_id"]) if len(rows) == _PAGE else until
    session.query(
        f"DELETE FROM {pipeline.exact} WHERE chunk_id IN ("
        f"SELECT chunk_id FROM {pipeline.exact} ORDER BY similarity, chunk_id OFFSET $1)",
        ["bigint"], _most_exact(pipeline),
    )  # fmt: skip
    return after


def keep_exact(
    session: Session, pipeline: Pipeline, chunk_ids: Sequence[int], similarities: Sequence[float | None]
) -> None:
    """Have every search rank these rows exactly, from now on.

    Rows that are ranked so already get the new similarity.
    """
    if not chunk_ids:
        return
    column = quote_ident(pipeline.version.column)
    session.query(
        f"""
        INSERT INTO {pipeline.exact} AS e (chunk_id, embedding, similarity)
        SELECT v.chunk_id, v.{column}, g.similarity FROM unnest($1, $2) AS g (chunk_id, similarity)
        JOIN {pipeline.vectors} AS v ON v.chunk_id = g.chunk_id
        ON CONFLICT (chunk_id) DO UPDATE SET embedding = excluded.embedding, similarity = excluded.similarity
        """,
        ["bigint[]", "real[]"],
        list(chunk_ids),
        list(similarities),
    )


def keep_late(session: Session, pipeline: Pipeline, chunk_ids: Sequence[int]) -> None:
    """Have rows ranked exactly that are written behind their version's check.

    They are of chunks older than those that the check covers.
    """
    if not pipeline.version.has_index or not chunk_ids:
        return
    known = session.scalar(
        "SELECT greatest(checked_to, pending_to) FROM embedline.index_reach WHERE version_id = $1",
        ["bigint"], pipeline.version.version_id,
    )  # fmt: skip
    late = [chunk_id for chunk_id in chunk_ids if known is not None and chunk_id <= known]
    keep_exact(session, pipeline, late, [None] * len(late))


def _forget_absent(session: Session, pipeline: Pipeline) -> None:
    session.query(
        f"DELETE FROM {pipeline.exact} AS e"
        f" WHERE NOT EXISTS (SELECT FROM {pipeline.vectors} AS v WHERE v.chunk_id = e.chunk_id)"
    )


def _look_again(session: Session, pipeline: Pipeline, yardstick: _Yardstick | None = None) -> None:
    """Score the rows that are ranked exactly because they came late.

    Those that are not far are dropped.
    """
    rows = session.query(
        f"SELECT e.chunk_id, {vector_schema(session)}.{pipeline.version.column_type}_send(e.embedding) AS vector"
        f" FROM {pipeline.exact} AS e WHERE e.similarity IS NULL ORDER BY e.chunk_id LIMIT $1",
        ["bigint"], _PAGE,
    )  # fmt: skip
    if not rows:
        return
    yardstick = yardstick or _yardstick(session, pipeline)
    if yardstick is None:
        return
    scores = yardstick.similarities(
        vectors.vectors_from_send([row["vector"] for row in rows], pipeline.version.column_type)
    )
    ids = [int(row["chunk_id"]) for row in rows]
    far = scores < yardstick.far
    session.query(
        f"DELETE FROM {pipeline.exact} WHERE chunk_id = ANY ($1)", ["bigint[]"],
        [chunk_id for chunk_id, is_far in zip(ids, far, strict=True) if not is_far],
    )  # fmt: skip
    session.query(
        f"UPDATE {pipeline.exact} AS e SET similarity = g.similarity FROM unnest($1, $2) AS g (chunk_id, similarity)"
        " WHERE e.chunk_id = g.chunk_id",
        ["bigint[]", "real[]"],
        [chunk_id for chunk_id, is_far in zip(ids, far, strict=True) if is_far],
        [float(score) for score, is_far in zip(scores, far, strict=True) if is_far],
    )


def rebuild_hint(session: Session, pipeline: Pipeline) -> str:
    """Return the statements that rebuild the version's index with a better graph."""
    own = own_index(pipeline, "")
    index = own.qualified
    if own.method == "ivfflat":
        return lists.rebuild_statements(session, pipeline, own)
    better = min(2 * int(str(pipeline.version.index_options.get("ef_construction", EF_CONSTRUCTION))), 1000)
    return f"ALTER INDEX {index} SET (ef_construction = {better}); REINDEX INDEX CONCURRENTLY {index};"
