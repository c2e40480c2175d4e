"""Whether a version may be indexed and may serve, counted in its tables."""

from __future__ import annotations

from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.errors import NotReady
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.queue.chunk_queue import FRESH

# Keys of quarantined rows that an error names.
_SHOWN_KEYS = 5

# A dead letter whose chunk is gone does not count.
_DEAD_LETTERS = """
    SELECT count(*) AS count, count(*) FILTER (WHERE accepted_by IS NULL) AS open,
        (array_agg(key::text ORDER BY chunk_id) FILTER (WHERE accepted_by IS NULL))[1:$2] AS keys
    FROM embedline.version_dead_letter AS d
    WHERE version_id = $1 AND EXISTS (SELECT FROM {chunk} AS c WHERE c.chunk_id = d.chunk_id)
"""


# Documents that the current recipe has not cut: their rows have no chunks in the sets that it added.
_UNCUT = "SELECT count(*) FROM {document} WHERE state = 'embedded' AND recipe <> $1"


def missing_chunks(session: Session, pipeline: Pipeline) -> int:
    """Count the missing chunks of the version.

    Those written in the last seconds do not count.
    """
    return int(
        session.scalar(
            f"""
            SELECT count(*) FROM {pipeline.chunk} AS c
            WHERE NOT EXISTS (SELECT FROM {pipeline.vectors} AS v WHERE v.chunk_id = c.chunk_id)
                AND NOT EXISTS (SELECT FROM embedline.version_dead_letter AS d
                    WHERE d.version_id = $1 AND d.chunk_id = c.chunk_id)
                AND c.chunk_id NOT IN (SELECT u.chunk_id FROM embedline.version_queue AS q
                    CROSS JOIN LATERAL unnest(q.chunk_ids) AS u (chunk_id)
                    WHERE q.version_id = $1 AND {FRESH})
            """,
            ["bigint"],
            pipeline.version.version_id,
        )
    )


def _progress(pipeline: Pipeline) -> str:
    return (
        f"SELECT * FROM embedline.versions WHERE pipeline = '{pipeline.name}' AND version = {pipeline.version.number};"
    )


def require_complete(pipeline: Pipeline) -> None:
    """Raise while the version's backfill is not through. Reads none of its tables."""
    if pipeline.version.state != "complete":
        raise NotReady(
            f'version {pipeline.version.number} of pipeline "{pipeline.name}" is still being filled',
            hint=f"{_progress(pipeline)} shows how far it is. Workers fill it; without one: SELECT embed_pending(1000);",
        )


def require_coverage(session: Session, pipeline: Pipeline) -> None:
    """Raise unless every row is cut as the version asks for, and embedded.

    A chunk needs its vector or an accepted dead letter. The queue need not be empty: under steady writes it never is, and
    what was written in the last seconds is on its way.
    """
    require_complete(pipeline)
    name, number, version = pipeline.name, pipeline.version.number, pipeline.version
    progress = _progress(pipeline)
    uncut = session.scalar(_UNCUT.format(document=pipeline.document), ["integer"], pipeline.recipe)
    if uncut:
        raise NotReady(
            f'version {number} of pipeline "{name}" lacks the chunks of {uncut} rows',
            detail="They are cut as an earlier recipe asked for.",
            hint=f"SELECT * FROM embedline.verify('{name}', repair => true); queues them.",
        )
    missing = missing_chunks(session, pipeline)
    if missing:
        raise NotReady(
            f'version {number} of pipeline "{name}" lacks {missing} vectors',
            detail="Its workers are behind, or the chunks were written where no queue saw it.",
            hint=f"{progress} shows what is queued; SELECT * FROM embedline.verify('{name}', repair => true); queues the rest.",
        )
    dead = session.query(
        _DEAD_LETTERS.format(chunk=pipeline.chunk), ["bigint", "integer"], version.version_id, _SHOWN_KEYS
    )[0]
    if dead["open"]:
        raise NotReady(
            f'version {number} of pipeline "{name}" could not embed {dead["open"]} chunks',
            detail=f"Of rows {', '.join(dead['keys'])}{' and others' if dead['open'] > _SHOWN_KEYS else ''}.",
            hint=f"SELECT embedline.accept_dead_letters('{name}', {number}); goes without them,"
            f" SELECT embedline.requeue_version('{name}', {number}); tries them again.",
        )
    if dead["count"] and session.scalar(f"SELECT 1 FROM {pipeline.vectors} LIMIT 1") is None:
        raise NotReady(
            f'version {number} of pipeline "{name}" has no vector at all', hint=f"{progress} shows the last error."
        )


def is_empty(session: Session, pipeline: Pipeline) -> bool:
    """Return True if the pipeline has embedded nothing and has nothing to embed.

    Then nothing can be lost, and nothing compared. Of a version that is complete this says that its source has no row with
    a content that the filter accepts.
    """
    queues = map(pipeline.generated, ("inbox", "deleted", "claim"))
    tables = (*pipeline.chunk_tables, pipeline.outbox, *queues)
    found = [f"EXISTS (SELECT FROM {table})" for table in tables]
    found.append(f"EXISTS (SELECT FROM {pipeline.document} WHERE state <> 'empty')")
    return not session.scalar(f"SELECT {' OR '.join(found)}")


def require_index(session: Session, pipeline: Pipeline) -> None:
    """Raise where the version is to have an index and has no valid one."""
    name, number = pipeline.name, pipeline.version.number
    if pipeline.version.index_method == "none":
        return
    state = session.scalar("SELECT embedline._index_state($1)", ["text"], names.vector_index(name, number))
    if state != "valid":
        raise NotReady(
            f'version {number} of pipeline "{name}" has no valid vector index',
            detail=f"It is {state}.",
            hint=f"SELECT embedline.build_vector_index('{name}', {number});",
        )


def require_usable_vectors(session: Session, pipeline: Pipeline) -> int:
    """Count the version's vectors.

    Raise where pgvector would leave some out of an index without a word. Those are NULL, and for a cosine or an inner
    product those of zero norm. Reads all vectors, as the build is about to.
    """
    version, schema = pipeline.version, vector_schema(session)
    column = quote_ident(version.column)
    unusable = f"{column} IS NULL"
    if version.distance != "l2":
        norm = "vector_norm" if version.column_type == "vector" else "l2_norm"
        unusable = f"({unusable} OR {schema}.{norm}({column}) = 0)"
    found = session.query(
        f"SELECT count(*) AS count, count(*) FILTER (WHERE {unusable}) AS unusable,"
        f" (array_agg(chunk_id) FILTER (WHERE {unusable}))[1:{_SHOWN_KEYS}] AS ids FROM {pipeline.vectors}"
    )[0]
    if found["unusable"]:
        raise NotReady(
            f'{found["unusable"]} vectors of version {version.number} of pipeline "{pipeline.name}" are NULL or zero',
            detail=f"An index would leave them out. chunk_id {', '.join(map(str, found['ids']))}"
            f"{' and others' if found['unusable'] > _SHOWN_KEYS else ''}.",
            hint=f"SELECT * FROM embedline.verify('{pipeline.name}', repair => true); or DELETE FROM {pipeline.vectors}"
            f" WHERE {unusable};",
        )
    return int(found["count"])
