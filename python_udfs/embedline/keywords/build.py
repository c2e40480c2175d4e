"""Index the chunks that are older than their pipeline's keyword index."""

from __future__ import annotations

import time

from embedline.catalog.values import Pipeline
from embedline.keywords.entries import add_entries
from embedline.keywords.postings import MAX_CHUNKS
from embedline.keywords.segments import LEAST_ENTRIES, Packing
from embedline.postgres.session import Session

# Chunks of one piece: of 150 words, they take 0.1 s.
_PIECE = 256
_BUILDS = """
    SELECT b.chunk_set_id, s.number, b.built_to, b.build_to FROM embedline.keyword_build AS b
    JOIN embedline.chunk_set AS s ON s.chunk_set_id = b.chunk_set_id
    WHERE s.pipeline_id = $1 AND b.built_to < b.build_to ORDER BY s.number
"""
_NOTE = "UPDATE embedline.keyword_build SET built_to = $2 WHERE chunk_set_id = $1 AND built_to < $2"


def begin_build(session: Session, pipeline: Pipeline, number: int) -> None:
    """Note that the chunks of a set that are stored now have to be indexed.

    No writer may be under way that does not know of the index: the pipeline's versions are locked (change_versions).
    """
    session.query(
        f"""
        INSERT INTO embedline.keyword_build (chunk_set_id, build_to)
        SELECT s.chunk_set_id, coalesce((SELECT max(c.chunk_id) FROM {pipeline.chunk_table(number)} AS c), 0)
        FROM embedline.chunk_set AS s WHERE s.pipeline_id = $1 AND s.number = $2
        """,
        ["bigint", "integer"],
        pipeline.pipeline_id,
        number,
    )


def has_build(session: Session, pipeline: Pipeline) -> bool:
    """Return True if chunks of the pipeline wait for their first entry."""
    return bool(session.query(_BUILDS, ["bigint"], pipeline.pipeline_id))


def built_share(session: Session, pipeline: Pipeline) -> float:
    """Return the share of the version's chunks that is indexed; 1 is all."""
    share = session.scalar(
        "SELECT least(b.built_to::double precision / greatest(b.build_to, 1), 1) FROM embedline.keyword_build AS b"
        " WHERE b.chunk_set_id = $1 AND b.built_to < b.build_to",
        ["bigint"],
        pipeline.chunk_set.chunk_set_id,
    )
    return 1.0 if share is None else float(share)


def build(session: Session, pipeline: Pipeline, seconds: float) -> bool:
    """Index waiting chunks for about so long; return True if more wait.

    Each piece takes the rows of its chunk set's build, so that two workers do not do the same work.
    """
    until = time.monotonic() + seconds
    while True:
        waiting = session.query(f"{_BUILDS} LIMIT 1 FOR UPDATE OF b SKIP LOCKED", ["bigint"], pipeline.pipeline_id)
        if not waiting:
            return False
        number = waiting[0]["number"]
        ids = session.query(
            f"SELECT c.chunk_id FROM {pipeline.chunk_table(number)} AS c"
            " WHERE c.chunk_id > $1 AND c.chunk_id <= $2 ORDER BY c.chunk_id LIMIT $3",
            ["bigint", "bigint", "integer"],
            waiting[0]["built_to"], waiting[0]["build_to"], _PIECE,
        )  # fmt: skip
        add_entries(session, pipeline, number, [row["chunk_id"] for row in ids])
        built_to = ids[-1]["chunk_id"] if len(ids) == _PIECE else waiting[0]["build_to"]
        session.query(_NOTE, ["bigint", "bigint"], waiting[0]["chunk_set_id"], built_to)
        # Nothing reads them before the build is through, so large segments are made at once.
        is_last = built_to >= waiting[0]["build_to"]
        Packing(session, pipeline, number).pack(LEAST_ENTRIES if is_last else MAX_CHUNKS)
        if time.monotonic() >= until:
            return has_build(session, pipeline)


def maintain(session: Session, pipeline: Pipeline) -> None:
    """Pack what was written since the last time, if the index is complete."""
    if pipeline.keyword is None or has_build(session, pipeline):
        return
    for chunk_set in (pipeline.chunk_set, *pipeline.other_sets):
        packing = Packing(session, pipeline, chunk_set.number)
        packing.pack()
        packing.merge()
