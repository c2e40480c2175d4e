"""Build vector indexes, by a client or by pg_cron's jobs.

CREATE INDEX CONCURRENTLY does not block writes of applications, but cannot run in a function. So pg_cron runs it, or a
client (index_build), or a person.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

from embedline.catalog.load import load_pipeline, load_version
from embedline.catalog.rights import require_control
from embedline.catalog.values import Pipeline
from embedline.core import ivfflat, names
from embedline.core.storage_size import hnsw_build_memory, hnsw_bytes
from embedline.errors import InsufficientMemory, InvalidParameter
from embedline.indexes.definitions import (
    VectorIndex,
    create_index_statement,
    find_index,
    index_state,
    load_indexes,
    wanted_lists,
)
from embedline.indexes.resources import BuildSettings, Need, choose, look_at_machine
from embedline.postgres import cron
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import BUILD_LOCK_CLASS, bound_lock_wait
from embedline.postgres.session import Session
from embedline.queue.coverage import require_coverage, require_usable_vectors

# pgvector's default of the index option m.
_DEFAULT_M = 16
_TABLE_KEY = "SELECT to_regclass($1)::oid::integer"
# A job of an index begins at the next full minute, and again each minute until it is taken away.
_EACH_MINUTE = "* * * * *"


def build_settings(
    session: Session, pipeline: Pipeline, index: VectorIndex, count: int, parallel_workers: int | None
) -> BuildSettings:
    """Return how to build an index over `count` vectors on this server.

    Raises InsufficientDisk if the disk has no room for it.
    """
    if index.method == "ivfflat":
        return _list_settings(session, pipeline, index, count, parallel_workers)
    m = int(str(pipeline.version.index_options.get("m", _DEFAULT_M)))
    shape = (count, index.dimensions, index.element_type, m)
    need = Need(memory=hnsw_build_memory(*shape, session.server_version), disk=hnsw_bytes(*shape))
    return choose(need, look_at_machine(session), parallel_workers)


def _list_settings(
    session: Session, pipeline: Pipeline, index: VectorIndex, count: int, parallel_workers: int | None
) -> BuildSettings:
    """Return how to build an IVFFlat index; raise InsufficientMemory."""
    lists = wanted_lists(pipeline, count)
    shape = (count, index.dimensions, index.element_type, lists)
    need = Need(memory=ivfflat.build_memory(*shape), disk=ivfflat.index_bytes(*shape))
    # Such a build takes next to no shared memory: k-means is one process's, and the workers sort in files.
    machine = replace(look_at_machine(session), free_shared_memory=None)
    settings = replace(choose(need, machine, parallel_workers), notices=())
    require_memory(settings, need, lists)
    return settings


def require_memory(settings: BuildSettings, need: Need, lists: int) -> None:
    """Raise InsufficientMemory if k-means needs more than the build gets.

    pgvector refuses the build then, after it has read the samples.
    """
    if settings.maintenance_work_mem_kb * 1024 < need.memory:
        raise InsufficientMemory(
            f"k-means for {lists:,} lists takes {need.memory / 2**20:,.0f} MB of memory,"
            f" the build gets {settings.maintenance_work_mem_kb // 1024:,} MB",
            detail="pgvector builds no IVFFlat index with less maintenance_work_mem.",
            hint=f"ALTER SYSTEM SET maintenance_work_mem = '{math.ceil(need.memory / 2**20)}MB'; SELECT pg_reload_conf();"
            " A version may also ask for fewer lists, with index_options.",
        )


def _vector_count(session: Session, pipeline: Pipeline) -> int:
    return int(session.scalar(f"SELECT count(*) FROM {pipeline.vectors}"))


def _chosen(session: Session, name: str, number: int | None) -> Pipeline:
    return load_pipeline(session, name) if number is None else load_version(session, name, number)


@entry_point
def index_statement(session: Session, name: str, number: int | None, precision: str | None) -> str | None:
    """Return the statement that builds an index of a version.

    NULL if there is no such index, or it is valid already.
    """
    pipeline = _chosen(session, name, number)
    index = find_index(session, pipeline, precision)
    if index is None or index_state(session, index) == "valid":
        return None
    count = _vector_count(session, pipeline) if index.method == "ivfflat" else 0
    return create_index_statement(pipeline, index, count)


@entry_point
def index_plan(
    session: Session, name: str, number: int | None, precision: str | None, parallel_workers: int | None
) -> str:
    """Return the client's steps to build an index, as JSON.

    Raises NotReady if the version is not verified to be complete.
    """
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
        "statement": create_index_statement(pipeline, index, count),
        "maintenance_work_mem_kb": settings.maintenance_work_mem_kb,
        "parallel_workers": settings.parallel_workers,
        "notices": settings.notices,
        "lock_key": [BUILD_LOCK_CLASS, session.scalar(_TABLE_KEY, ["text"], pipeline.vectors)],
    })  # fmt: skip


def job(pipeline: Pipeline, index: VectorIndex) -> str:
    """Return the name of the job that builds an index."""
    return names.index_job(pipeline.name, pipeline.version.number, index.precision)


def schedule_build(
    session: Session, pipeline: Pipeline, index: VectorIndex, count: int, parallel_workers: int | None = None
) -> BuildSettings:
    """Have pg_cron build an index over `count` vectors.

    Returns the settings of the build.
    """
    settings = build_settings(session, pipeline, index, count, parallel_workers)
    command = _job_command(create_index_statement(pipeline, index, count), settings)
    cron.schedule(session, job(pipeline, index), _EACH_MINUTE, command)
    return settings


def _job_command(statement: str, settings: BuildSettings) -> str:
    """Return a job's command: one statement, which carries its settings in a comment.

    A job has a session of its own, but SET and CREATE INDEX CONCURRENTLY in one string would be one transaction. The
    event trigger embedline_build_settings reads the comment and sets them as the statement begins.
    """
    return (
        f"{statement} /* embedline build: maintenance_work_mem ="
        f" {settings.maintenance_work_mem_kb}kB, max_parallel_maintenance_workers = {settings.parallel_workers} */"
    )


@entry_point
def build_vector_index(session: Session, name: str, number: int | None) -> str:
    """Have pg_cron build a version's missing indexes; return the steps that follow."""
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
        if states[index] == "invalid":
            session.execute(f"DROP INDEX {index.qualified}")
        settings = schedule_build(session, pipeline, index, count)
        for notice in settings.notices:
            session.plpy.notice(f"{index.name}: {notice}")
        done.append(
            f"pg_cron builds {index.name} at the next full minute, with maintenance_work_mem ="
            f" {settings.maintenance_work_mem_kb // 1024} MB and {settings.parallel_workers} parallel workers"
        )
    return "; ".join(done)


def _require_cron(session: Session, pipeline: Pipeline) -> None:
    if not cron.has_cron(session):
        raise InvalidParameter(
            "pg_cron is not installed in this database",
            detail="CREATE INDEX CONCURRENTLY cannot run in a function.",
            hint=f"From a shell: embedline build-index {pipeline.name} --version {pipeline.version.number}",
        )
