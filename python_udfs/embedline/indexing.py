"""Vector indexes: which a version has, the statement that builds one, and pg_cron's jobs that do.

CREATE INDEX CONCURRENTLY, by which no application write waits, cannot run in a function. So it is run by pg_cron, or by a
client (index_build), or by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from embedline.catalog import Pipeline, load_pipeline, load_version, load_versions
from embedline.coverage import require_coverage, require_usable_vectors
from embedline.database import Session, data_name, entry_point, quote_ident, quote_literal, vector_schema
from embedline.errors import InvalidParameter, NotFound
from embedline.pipelines import bound_lock_wait, require_control
from embedline.preflight import BuildSettings, Need, choose, look_at_machine
from embedline.schedule import index_job
from embedline.storage_size import hnsw_build_memory, hnsw_bytes

State = Literal["missing", "invalid", "building", "valid"]

# pgvector's default of the index option.
_DEFAULT_M = 16
_HAMMING = "bit_hamming_ops"
# First key of the session advisory lock that builds on one table exclude each other by ("Emi1"); the second is the table's oid.
_BUILD_LOCK_CLASS = 1164798257
_TABLE_KEY = "SELECT to_regclass($1)::oid::integer"
# By the catalogue, not to_regclass: readers, who search, have no USAGE on embedline_data.
# A build reports which index it builds once that is in the catalogue; for an instant before, only the table.
_STATE = """
    SELECT i.indisvalid AS valid, EXISTS (
        SELECT FROM pg_stat_progress_create_index AS p
        WHERE p.index_relid = i.indexrelid OR (p.relid = i.indrelid AND p.index_relid = 0)) AS building
    FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE c.relname = $1 AND c.relnamespace = (SELECT n.oid FROM pg_namespace AS n WHERE n.nspname = 'embedline_data')
"""
_HAS_CRON = "SELECT to_regclass('cron.job') IS NOT NULL"
_JOBS = """
    SELECT jobname AS name, command FROM cron.job
    WHERE database = current_database() AND starts_with(jobname, $1) ORDER BY jobid
"""
_SCHEDULE = "SELECT cron.schedule($1, '* * * * *', $2)"
_UNSCHEDULE = "SELECT cron.unschedule(jobid) FROM cron.job WHERE database = current_database() AND jobname = $1"
_PRECISIONS = """
    SELECT name, kind, dimensions, oversampling FROM embedline.precision_index WHERE version_id = $1 ORDER BY name
"""


@dataclass(frozen=True)
class VectorIndex:
    """An index over a version's vectors: that of the column itself (`precision` None), or one of less precision.

    `operand` is what is indexed, with `{}` for the vector: a search has to order by the very same expression.
    `element_type` and `dimensions` are what the graph holds.
    """

    precision: str | None
    name: str
    operand: str
    operator: str
    operator_class: str
    element_type: str
    dimensions: int
    oversampling: float = 1.0

    @property
    def qualified(self) -> str:
        """Schema and name, quoted."""
        return data_name(self.name)


def own_index(pipeline: Pipeline, schema: str) -> VectorIndex:
    """Return the index of the column itself."""
    version = pipeline.version
    return VectorIndex(
        precision=None,
        name=f"{pipeline.name}_v{version.number}_embedding_idx",
        operand="{}",
        operator=f"OPERATOR({schema}.{version.operator})",
        operator_class=f"{schema}.{version.operator_class}",
        element_type=version.column_type,
        dimensions=version.dimensions,
    )


def precision_index(pipeline: Pipeline, schema: str, row: dict[str, Any]) -> VectorIndex:
    """Return a shadow index from its row in embedline.precision_index.

    The vector is cast to its type without dimensions first: then the expression is the same over the table, over a version's
    view and over the routing view, whose column has no dimensions, and the planner finds the index through each of them.
    """
    version = pipeline.version
    kind, dimensions, column_type = str(row["kind"]), int(row["dimensions"]), version.column_type
    vector = f"{{}}::{schema}.{column_type}"
    opclass = version.operator_class.removeprefix(f"{column_type}_")
    operand, operator, operator_class, element_type = {
        "halfvec": (f"({vector}::{schema}.halfvec({dimensions}))", version.operator, f"halfvec_{opclass}", "halfvec"),
        "binary": (f"({schema}.binary_quantize({vector})::bit({dimensions}))", "<~>", _HAMMING, "bit"),
        "prefix": (
            f"({schema}.subvector({vector}, 1, {dimensions})::{schema}.{column_type}({dimensions}))",
            version.operator,
            version.operator_class,
            column_type,
        ),
    }[kind]
    return VectorIndex(
        precision=str(row["name"]),
        name=f"{pipeline.name}_v{version.number}_{row['name']}_idx",
        operand=operand,
        operator=f"OPERATOR({schema}.{operator})",
        operator_class=f"{schema}.{operator_class}",
        element_type=element_type,
        dimensions=dimensions,
        oversampling=float(row["oversampling"]),
    )


def load_indexes(session: Session, pipeline: Pipeline) -> list[VectorIndex]:
    """Return the indexes that `pipeline.version` is to have, its column's own first."""
    schema = vector_schema(session)
    own = [] if pipeline.version.index_method == "none" else [own_index(pipeline, schema)]
    rows = session.query(_PRECISIONS, ["bigint"], pipeline.version.version_id)
    return own + [precision_index(pipeline, schema, row) for row in rows]


def find_index(session: Session, pipeline: Pipeline, precision: str | None) -> VectorIndex | None:
    """Return one of `load_indexes`; None for the column's own where the version has none. Raises NotFound."""
    indexes = load_indexes(session, pipeline)
    for index in indexes:
        if index.precision == precision:
            return index
    if precision is None:
        return None
    known = [f'"{index.precision}"' for index in indexes if index.precision is not None]
    raise NotFound(
        f'version {pipeline.version.number} of pipeline "{pipeline.name}" has no precision index "{precision}"',
        detail=f"It has {', '.join(known)}." if known else None,
        hint=f"SELECT embedline.add_precision_index({quote_literal(pipeline.name)}, {pipeline.version.number}, 'halfvec');",
    )


def index_state(session: Session, index: VectorIndex) -> State:
    """Return whether the index is there, and may be used."""
    rows = session.query(_STATE, ["name"], index.name)
    if not rows:
        return "missing"
    if rows[0]["valid"]:
        return "valid"
    return "building" if rows[0]["building"] else "invalid"


def create_index_statement(pipeline: Pipeline, index: VectorIndex) -> str:
    """Return the CREATE INDEX CONCURRENTLY of one index."""
    options = ", ".join(f"{name} = {int(str(value))}" for name, value in sorted(pipeline.version.index_options.items()))
    return (
        f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {quote_ident(index.name)} ON {pipeline.vectors}"
        f" USING hnsw ({index.operand.format(quote_ident(pipeline.version.column))} {index.operator_class})"
        + (f" WITH ({options})" if options else "")
    )


def build_settings(
    session: Session, pipeline: Pipeline, index: VectorIndex, count: int, parallel_workers: int | None
) -> BuildSettings:
    """Return how to build an index over `count` vectors on this server; raises where the disk has no room for it."""
    m = int(str(pipeline.version.index_options.get("m", _DEFAULT_M)))
    shape = (count, index.dimensions, index.element_type, m)
    need = Need(memory=hnsw_build_memory(*shape), disk=hnsw_bytes(*shape))
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


def maintain(session: Session, pipeline: Pipeline) -> None:
    """See to it that the serving version gets its index once it is complete, and that builds by pg_cron come to an end.

    Workers call it when they have nothing to embed.
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
