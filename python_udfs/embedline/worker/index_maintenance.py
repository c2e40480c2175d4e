"""Build and check the vector indexes of pipelines that workers write to."""

from __future__ import annotations

from embedline.catalog.health import isolate_failure
from embedline.catalog.load import load_versions
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.indexes import lists
from embedline.indexes.build import job, schedule_build
from embedline.indexes.definitions import VectorIndex, index_state, load_indexes, own_index
from embedline.keywords import build
from embedline.postgres.cron import has_cron, unschedule
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.search import exact_rows

_JOBS = """
    SELECT jobname AS name, command FROM cron.job
    WHERE database = current_database() AND starts_with(jobname, $1) ORDER BY jobid
"""
_UNFINISHED = """
    SELECT ARRAY(
        SELECT DISTINCT p.pipeline_id FROM embedline.pipeline AS p
        JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
        LEFT JOIN embedline.index_reach AS r ON r.version_id = v.version_id
        WHERE p.state = 'active' AND NOT p.is_resting AND ($1 IS NULL OR p.name = $1) AND (r.pending_to IS NOT NULL
            OR EXISTS (SELECT FROM embedline.keyword_build AS b JOIN embedline.chunk_set AS s ON s.chunk_set_id = b.chunk_set_id
                WHERE s.pipeline_id = p.pipeline_id AND b.built_to < b.build_to){builds})
    )
"""
_UNFINISHED_CHECKS = _UNFINISHED.format(builds="")
_UNFINISHED_BUILDS = _UNFINISHED.format(
    builds=""" OR v.version_id = p.serving_version_id AND v.state = 'complete' AND v.index_method <> 'none'
        AND embedline._index_state(p.name || '_v' || v.number || '_embedding_idx') <> 'valid' OR EXISTS (
            SELECT FROM cron.job AS j WHERE j.database = current_database()
                AND starts_with(j.jobname, 'embedline index ' || p.name || ' '))"""
)


def unfinished(session: Session, name: str | None) -> list[int]:
    """Return the pipelines, or the one named, with an unfinished index build or check.

    One statement for all.
    """
    return list(session.scalar(_UNFINISHED_BUILDS if has_cron(session) else _UNFINISHED_CHECKS, ["text"], name) or ())


def maintain(session: Session, pipeline: Pipeline) -> None:
    """Schedule the serving version's index once due; unschedule finished builds.

    Workers call it every few seconds.
    """
    if not has_cron(session):
        return
    jobs = {
        str(row["name"]): str(row["command"]) for row in session.query(_JOBS, ["text"], names.index_jobs(pipeline.name))
    }
    own = own_index(pipeline, vector_schema(session))
    _renew(session, pipeline, own, jobs)
    wants_own = pipeline.version.index_method != "none" and pipeline.version.state == "complete"
    if not jobs and (not wants_own or index_state(session, own) in ("valid", "building")):
        return
    for version in load_versions(session, pipeline.name):
        for index in load_indexes(session, version):
            name = job(version, index)
            is_own = wants_own and version.version.number == pipeline.version.number and index.precision is None
            if name in jobs or is_own:
                _maintain_index(session, version, index, jobs.pop(name, None))
    for name in jobs:
        # The version or the index was dropped.
        unschedule(session, name)


def maintain_isolated(session: Session, pipeline: Pipeline) -> None:
    """Maintain a pipeline's indexes; if that fails the other pipelines go on."""
    isolate_failure(session, pipeline, lambda: _note_lists(session, pipeline))
    isolate_failure(session, pipeline, lambda: maintain(session, pipeline))
    isolate_failure(session, pipeline, lambda: exact_rows.maintain(session, pipeline))
    if pipeline.keyword is not None:
        isolate_failure(session, pipeline, lambda: build.maintain(session, pipeline))


def _note_lists(session: Session, pipeline: Pipeline) -> None:
    several = len(pipeline.versions) > 1
    for version in load_versions(session, pipeline.name) if several else [pipeline]:
        if version.version.index_method == "ivfflat" and version.version.has_index:
            lists.note_build(session, version)


def _renew(session: Session, pipeline: Pipeline, own: VectorIndex, jobs: dict[str, str]) -> None:
    """Build the lists of the serving version again once they have drifted.

    A second index is built beside the first and takes its place. Its job is taken out of `jobs`.
    """
    if own.method != "ivfflat":
        return
    following = lists.successor(pipeline, own)
    command = jobs.pop(job(pipeline, following), None)
    if index_state(session, own) != "valid":
        return
    state = index_state(session, following)
    if state == "valid":
        lists.swap(session, pipeline, own, following)
        if command is not None:
            unschedule(session, job(pipeline, following))
    elif state == "invalid" or (state == "missing" and command is None and lists.drift(session, pipeline) is not None):
        _maintain_index(session, pipeline, following, command)


def _maintain_index(session: Session, pipeline: Pipeline, index: VectorIndex, command: str | None) -> None:
    state = index_state(session, index)
    name = job(pipeline, index)
    if state == "valid" and command is not None:
        unschedule(session, name)
    elif state == "invalid" or (state == "missing" and command is None):
        if state == "invalid":
            # The leftover of a build that failed serves no query and slows every write.
            session.execute("SET LOCAL lock_timeout = '1s'")
            session.execute(f"DROP INDEX {index.qualified}")
        # A build that failed is tried again without parallel workers: shared memory is the most frequent cause.
        _schedule(session, pipeline, index, parallel_workers=0 if state == "invalid" else None)


def _schedule(session: Session, pipeline: Pipeline, index: VectorIndex, parallel_workers: int | None) -> None:
    count = int(session.scalar(f"SELECT count(*) FROM {pipeline.vectors}"))
    schedule_build(session, pipeline, index, count, parallel_workers)
