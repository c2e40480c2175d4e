"""Building vector indexes: what a client has to do, and pg_cron's jobs.

CREATE INDEX CONCURRENTLY, by which no application write waits, cannot run in a function. So it is run by pg_cron, or by a
client (index_build), or by hand.
"""

from __future__ import annotations

import json

from embedline import reach
from embedline.catalog import Pipeline, load_pipeline, load_version, load_versions
from embedline.coverage import require_coverage, require_usable_vectors
from embedline.database import Session, entry_point, vector_schema
from embedline.dead_letters import contain
from embedline.errors import InvalidParameter
from embedline.pipelines import bound_lock_wait, require_control
from embedline.preflight import BuildSettings, Need, choose, look_at_machine
from embedline.schedule import index_job
from embedline.storage_size import hnsw_build_memory, hnsw_bytes
from embedline.vector_index import (
    VectorIndex,
    create_index_statement,
    find_index,
    index_state,
    load_indexes,
    own_index,
)

# pgvector's default of the index option.
_DEFAULT_M = 16
# First key of the session advisory lock that builds on one table exclude each other by ("Emi1"); the second is the table's oid.
_BUILD_LOCK_CLASS = 1164798257
_TABLE_KEY = "SELECT to_regclass($1)::oid::integer"
_HAS_CRON = "SELECT to_regclass('cron.job') IS NOT NULL"
_JOBS = """
    SELECT jobname AS name, command FROM cron.job
    WHERE database = current_database() AND starts_with(jobname, $1) ORDER BY jobid
"""
_UNFINISHED = """
    SELECT ARRAY(
        SELECT DISTINCT p.pipeline_id FROM embedline.pipeline AS p
        JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
        LEFT JOIN embedline.index_reach AS r ON r.version_id = v.version_id
        LEFT JOIN pg_class AS c ON c.relnamespace = 'embedline_data'::regnamespace
            AND c.relname = p.name || '_v' || v.number || '_embedding_idx'
        LEFT JOIN pg_index AS i ON i.indexrelid = c.oid
        WHERE p.state = 'active' AND NOT p.is_resting AND ($1 IS NULL OR p.name = $1) AND (r.pending_to IS NOT NULL{builds})
    )
"""
_UNFINISHED_CHECKS = _UNFINISHED.format(builds="")
_UNFINISHED_BUILDS = _UNFINISHED.format(
    builds=""" OR v.version_id = p.serving_version_id AND v.state = 'complete' AND v.index_method <> 'none'
        AND i.indisvalid IS DISTINCT FROM true OR EXISTS (
            SELECT FROM cron.job AS j WHERE j.database = current_database()
                AND starts_with(j.jobname, 'embedline index ' || p.name || ' '))"""
)
_SCHEDULE = "SELECT cron.schedule($1, '* * * * *', $2)"
_UNSCHEDULE = "SELECT cron.unschedule(jobid) FROM cron.job WHERE database = current_database() AND jobname = $1"


def build_settings(
    session: Session, pipeline: Pipeline, index: VectorIndex, count: int, parallel_workers: int | None
) -> BuildSettings:
    """Return how to build an index over `count` vectors on this server; raises where the disk has no room for it."""
    m = int(str(pipeline.version.index_options.get("m", _DEFAULT_M)))
    shape = (count, index.dimensions, index.element_type, m)
    need = Need(memory=hnsw_build_memory(*shape, session.server_version), disk=hnsw_bytes(*shape))
    return choose(need, look_at_machine(session), parallel_workers)


def _chosen(session: Session, name: str, number: int | None) -> Pipeline:
    return load_pipeline(session, name) if number is None else load_version(session, name, number)


@entry_point
def index_statement(session: Session, name: str, number: int | None, precision: str | None) -> str | None:
    """Return the statement that builds an index of a version; NULL where there is none, or it is valid already."""
    pipeline = _chosen(session, name, number)
    index = find_index(session, pipeline, precision)
    if index is None or index_state(session, index) == "valid":
        return None
    return create_index_statement(pipeline, index)


@entry_point
def index_plan(
    session: Session, name: str, number: int | None, precision: str | None, parallel_workers: int | None
) -> str:
    """Return what a client has to do to build an index, as JSON; raises where the version is not verified to be complete."""
    pipeline = _chosen(session, name, number)
    index = find_index(session, pipeline, precision)
    if index is None:
        return json.dumps({"state": "none"})
    state = index_state(session, index)
    if state in ("valid", "building"):
        return json.dumps({"state": state, "index": index.qualified})
    require_coverage(session, pipeline)
    count = require_usable_vectors(session, pipeline)
    settings = build_settings(session, pipeline, index, count, parallel_workers)
    return json.dumps({
        "state": state,
        "index": index.qualified,
        "statement": create_index_statement(pipeline, index),
        "maintenance_work_mem_kb": settings.maintenance_work_mem_kb,
        "parallel_workers": settings.parallel_workers,
        "notices": settings.notices,
        "lock_key": [_BUILD_LOCK_CLASS, session.scalar(_TABLE_KEY, ["text"], pipeline.vectors)],
    })  # fmt: skip


def _job(pipeline: Pipeline, index: VectorIndex) -> str:
    return index_job(pipeline.name, pipeline.version.number, index.precision)


def _job_command(pipeline: Pipeline, index: VectorIndex, settings: BuildSettings) -> str:
    """Return a job's command: one statement, which carries its settings in a comment.

    A job has a session of its own, but SET and CREATE INDEX CONCURRENTLY in one string would be one transaction. The event
    trigger embedline_build_settings reads the comment and sets them as the statement begins.
    """
    return (
        f"{create_index_statement(pipeline, index)} /* embedline build: maintenance_work_mem ="
        f" {settings.maintenance_work_mem_kb}kB, max_parallel_maintenance_workers = {settings.parallel_workers} */"
    )


@entry_point
def build_vector_index(session: Session, name: str, number: int | None) -> str:
    """Have pg_cron build what a version lacks of its indexes; return what happens now."""
    require_control(session, name)
    pipeline = _chosen(session, name, number)
    label = f'version {pipeline.version.number} of pipeline "{name}"'
    indexes = load_indexes(session, pipeline)
    if not indexes:
        return f"{label} has no vector index"
    states = {index: index_state(session, index) for index in indexes}
    lacking = [index for index, state in states.items() if state in ("missing", "invalid")]
    if not lacking:
        return "; ".join(
            f"{index.name} is {'being built' if state == 'building' else state}" for index, state in states.items()
        )
    require_coverage(session, pipeline)
    count = require_usable_vectors(session, pipeline)
    _require_cron(session, pipeline)
    bound_lock_wait(session)
    done = []
    for index in lacking:
        settings = build_settings(session, pipeline, index, count, None)
        for notice in settings.notices:
            session.plpy.notice(f"{index.name}: {notice}")
        if states[index] == "invalid":
            session.execute(f"DROP INDEX {index.qualified}")
        session.query(_SCHEDULE, ["text", "text"], _job(pipeline, index), _job_command(pipeline, index, settings))
        done.append(
            f"pg_cron builds {index.name} at the next full minute, with maintenance_work_mem ="
            f" {settings.maintenance_work_mem_kb // 1024} MB and {settings.parallel_workers} parallel workers"
        )
    return "; ".join(done)


def _require_cron(session: Session, pipeline: Pipeline) -> None:
    if not session.scalar(_HAS_CRON):
        raise InvalidParameter(
            "pg_cron is not installed in this database",
            detail="CREATE INDEX CONCURRENTLY cannot run in a function.",
            hint=f"From a shell: embedline build-index {pipeline.name} --version {pipeline.version.number}",
        )


def unfinished(session: Session, name: str | None) -> list[int]:
    """Return the pipelines, or the one named, with an index to be built or a check of one that goes on: one statement for all."""
    has_cron = session.scalar(_HAS_CRON)
    return list(session.scalar(_UNFINISHED_BUILDS if has_cron else _UNFINISHED_CHECKS, ["text"], name) or ())


def maintain(session: Session, pipeline: Pipeline) -> None:
    """See to it that the serving version gets its index once it is complete, and that builds by pg_cron come to an end.

    Workers call it every few seconds.
    """
    if not session.scalar(_HAS_CRON):
        return
    jobs = {
        str(row["name"]): str(row["command"])
        for row in session.query(_JOBS, ["text"], f"embedline index {pipeline.name} ")
    }
    own = own_index(pipeline, vector_schema(session))
    wants_own = pipeline.version.index_method != "none" and pipeline.version.state == "complete"
    if not jobs and (not wants_own or index_state(session, own) in ("valid", "building")):
        return
    for version in load_versions(session, pipeline.name):
        for index in load_indexes(session, version):
            name = _job(version, index)
            is_own = wants_own and version.version.number == pipeline.version.number and index.precision is None
            if name in jobs or is_own:
                _look_after(session, version, index, jobs.pop(name, None))
    for name in jobs:
        # Of a version or an index that was dropped.
        session.query(_UNSCHEDULE, ["text"], name)


def maintain_contained(session: Session, pipeline: Pipeline) -> None:
    """Maintain a pipeline's indexes, but for a version beside the serving one; where that fails the others go on."""
    if not pipeline.is_lane:
        contain(session, pipeline, lambda: maintain(session, pipeline))
        contain(session, pipeline, lambda: reach.maintain(session, pipeline))


def _look_after(session: Session, pipeline: Pipeline, index: VectorIndex, command: str | None) -> None:
    state = index_state(session, index)
    name = _job(pipeline, index)
    if state == "valid" and command is not None:
        session.query(_UNSCHEDULE, ["text"], name)
    elif state == "invalid" or (state == "missing" and command is None):
        if state == "invalid":
            # The leftover of a build that failed serves no query and slows every write.
            session.execute("SET LOCAL lock_timeout = '1s'")
            session.execute(f"DROP INDEX {index.qualified}")
        # What failed in parallel is tried again alone: shared memory is what fails most often.
        _schedule(session, pipeline, index, parallel_workers=0 if state == "invalid" else None)


def _schedule(session: Session, pipeline: Pipeline, index: VectorIndex, parallel_workers: int | None) -> None:
    count = int(session.scalar(f"SELECT count(*) FROM {pipeline.vectors}"))
    settings = build_settings(session, pipeline, index, count, parallel_workers)
    session.query(_SCHEDULE, ["text", "text"], _job(pipeline, index), _job_command(pipeline, index, settings))
