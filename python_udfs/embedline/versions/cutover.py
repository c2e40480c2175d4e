"""Cut over to another version, and back.

The swap is the last thing that a call does. The routing view is locked for milliseconds, and readers wait no longer
than one try for that lock (`retry_locked`). Workers' writes are kept out while the version catches up with the last
chunks. So nothing that the outgoing version shows is missing from the incoming one.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial

from embedline.catalog.load import load_version
from embedline.catalog.rights import require_control
from embedline.catalog.values import Pipeline
from embedline.core.processes import prepare_environment
from embedline.errors import NotReady
from embedline.gate.training import require_untrained_canaries
from embedline.models import circuit
from embedline.pipelines import published
from embedline.pipelines.plan import current_plan
from embedline.pipelines.replaced_views import LetGo, await_view, require_swappable, show_version
from embedline.pipelines.state import load_alone
from embedline.pipelines.views import write_serving_function
from embedline.postgres.claims import CALLERS_TRANSACTION
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import hold_source, retry_locked
from embedline.postgres.session import Session
from embedline.queue import chunk_queue, coverage
from embedline.versions.derived import fill, require_derived, showing
from embedline.worker.batch import Batch
from embedline.worker.engine import Engine
from embedline.worker.version_chunks import VersionChunks

# Seconds in which a version may embed the chunks of the last changes.
_CUTOVER_SECONDS, _ROLLBACK_SECONDS = 2.0, 2.0
# Seconds in which the swap tries for the routing view. It was free before; rows that the version caught up with are locked.
_SWAP_SECONDS = 2.0
# Seconds in which a cutover waits for transactions that would see the version empty.
_SNAPSHOT_SECONDS = 2.0
_CATCH_UP_CHUNKS = 500
_PATIENCE_SECONDS = 0.0

_GATE = "SELECT evaluation_id, verdict FROM embedline._gate($1)"
# Where the serving version came from. A rollback is no such step: after it, the way back is the next cutover.
_CAME_FROM = """
    SELECT v.number FROM embedline.cutover AS c JOIN embedline.version AS v ON v.version_id = c.from_version_id
    WHERE c.to_version_id = $1 AND c.kind = 'cutover' ORDER BY c.cutover_id DESC LIMIT 1
"""
_SERVE = """
    UPDATE embedline.pipeline SET serving_version_id = $2, generation = generation + 1 WHERE pipeline_id = $1
"""
_LOG = """
    INSERT INTO embedline.cutover (pipeline_id, kind, from_version_id, to_version_id, from_number, to_number, evaluation_id,
        override_reason)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING cutover_id
"""
_GO_ON = "UPDATE embedline.version SET state = 'backfilling', completed_at = NULL WHERE version_id = $1"
# Snapshots of before the version was complete; a statement of READ COMMITTED has one only while it runs.
_OLDER_SNAPSHOTS = """
    SELECT array_agg(a.pid) FROM pg_stat_activity AS a, embedline.version AS v
    WHERE v.version_id = $1 AND a.datname = current_database() AND a.backend_type = 'client backend'
        AND a.backend_xmin IS NOT NULL AND a.xact_start < v.completed_at AND a.pid <> pg_backend_pid()
"""
_LEFT = """
    SELECT coalesce(sum(cardinality(chunk_ids)), 0) AS count,
        bool_or(not_before <= clock_timestamp() AND crash_count = 0) AS is_due
    FROM embedline.version_queue WHERE version_id = $1 AND chunk_ids IS NOT NULL
"""
# Reason that is recorded if none was given and a gate has nothing to measure.
_EMPTY = "the pipeline is empty"
# Whether a session waits for a lock on a table.
_IS_WANTED = """
    SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'relation' AND relation = $1::oid
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
"""


@entry_point
def cutover(session: Session, name: str, number: int, override_reason: str | None) -> None:
    """Have a version serve if it is complete, indexed, and its gate has passed.

    A reason overrides the gate.
    """
    require_control(session, name)
    pipeline = load_alone(session, name, holds_source=False)
    target = load_version(session, name, number)
    if target.is_serving:
        session.plpy.notice(f'version {number} of pipeline "{name}" serves already')
        return
    coverage.require_complete(target)
    coverage.require_index(session, target)
    published.require_published(session, target)
    evaluation_id, override_reason = _require_gate(session, target, override_reason)
    require_swappable(session, target)
    require_derived(session, target, _CUTOVER_SECONDS)
    _require_no_older_snapshot(session, target)
    await_view(session, target)
    # From here on a TRUNCATE waits for this transaction, and every other writer behind it: whatever may take long is done.
    hold_source(session, target.source_oid)
    coverage.require_coverage(session, target)
    left = _catch_up(session, target, _CUTOVER_SECONDS)
    if left:
        raise NotReady(
            f'version {number} of pipeline "{name}" is {left} chunks behind',
            hint="Run it again when its workers have caught up:"
            f" SELECT queued, last_error FROM embedline.versions WHERE pipeline = '{name}' AND version = {number};",
        )
    _swap(session, pipeline, target, "cutover", evaluation_id, override_reason)


@entry_point
def rollback(session: Session, name: str) -> int:
    """Have the version serve again that served before; return its number.

    It was written with every change.
    """
    require_control(session, name)
    pipeline = load_alone(session, name, holds_source=False)
    number = session.scalar(_CAME_FROM, ["bigint"], pipeline.version.version_id)
    if number is None:
        raise NotReady(
            f'there is no version that pipeline "{name}" could go back to',
            detail=f"Version {pipeline.version.number} was never cut over to, or the one before it is dropped.",
            hint=f"SELECT * FROM embedline.versions WHERE pipeline = '{name}'; lists the versions.",
        )
    target = load_version(session, name, number)
    require_swappable(session, target)
    fill(session, target, _ROLLBACK_SECONDS)
    await_view(session, target)
    hold_source(session, target.source_oid)
    left = _catch_up(session, target, _ROLLBACK_SECONDS)
    if left:
        session.plpy.warning(
            f"{left} chunks of the last changes follow within moments: version {number} is behind with them"
        )
    _swap(session, pipeline, target, "rollback", None, None)
    return int(number)


def _require_no_older_snapshot(session: Session, target: Pipeline) -> None:
    """Raise if transactions are open that began before the version was complete.

    The view would show them gaps.
    """
    limit = time.monotonic() + _SNAPSHOT_SECONDS
    while pids := session.scalar(_OLDER_SNAPSHOTS, ["bigint"], target.version.version_id):
        if time.monotonic() > limit:
            raise NotReady(
                f"transactions are open that began before version {target.version.number} was complete",
                detail=f"To them it would be empty. Processes {', '.join(map(str, pids))}.",
                hint="Cut over when they are through, or end them: SELECT pg_terminate_backend(pid);",
            )
        session.execute("SELECT pg_sleep(0.05)")


def _require_gate(session: Session, target: Pipeline, override_reason: str | None) -> tuple[int | None, str | None]:
    """Return the evaluation that opens the cutover, and the reason to override.

    Raises if there is neither.
    """
    rows = session.query(_GATE, ["bigint"], target.version.version_id)
    verdict = rows[0]["verdict"] if rows else None
    evaluation_id = int(rows[0]["evaluation_id"]) if rows else None
    if (override_reason or "").strip():
        return evaluation_id, override_reason
    require_untrained_canaries(session, target, target.version.model)
    if verdict == "pass":
        return evaluation_id, override_reason
    if _is_empty(session, target):
        return evaluation_id, _EMPTY
    name, number = target.name, target.version.number
    raise NotReady(
        f'version {number} of pipeline "{name}" has no passing gate',
        detail=f"Its last evaluation is {verdict}."
        if verdict
        else "It was not evaluated against the version that serves.",
        hint=f"SELECT * FROM embedline.evaluate('{name}', {number}); or, to go without,"
        f" SELECT embedline.cutover('{name}', {number}, override_reason => '...');",
    )


def _is_empty(session: Session, target: Pipeline) -> bool:
    """Return True if the pipeline's tables are empty behind a held source.

    All locks are released again, because more waits follow.
    """
    found = False
    with contextlib.suppress(LetGo), session.plpy.subtransaction():
        hold_source(session, target.source_oid)
        found = coverage.is_empty(session, target)
        raise LetGo
    return found


def _catch_up(session: Session, target: Pipeline, seconds: float) -> int:
    """Embed the chunks that the version lacks, beside its workers, for a time.

    Returns how many are left.

    Or before, if the provider is known to be away, or if another session wants the source alone, for a TRUNCATE.
    Workers then write nothing more of it, and no later writer can write at all.
    """
    prepare_environment()
    engine = Engine(session, CALLERS_TRANSACTION, _PATIENCE_SECONDS)
    source = VersionChunks(session, CALLERS_TRANSACTION, target)
    deadline = time.monotonic() + seconds

    def is_over() -> bool:
        return time.monotonic() > deadline or bool(session.scalar(_IS_WANTED, ["bigint"], target.source_oid))

    while True:
        left = session.query(_LEFT, ["bigint"], target.version.version_id)[0]
        if not left["count"] or not left["is_due"] or is_over():
            return int(left["count"])
        if circuit.is_open(session, target.version.model.model_id):
            return int(left["count"])
        claim = chunk_queue.claim_lists(session, target, _CATCH_UP_CHUNKS, CALLERS_TRANSACTION)
        if claim is None:
            # Workers have the rest in flight.
            session.execute("SELECT pg_sleep(0.005)")
        else:
            engine.run(Batch(source, claim), is_over)


def _swap(
    session: Session,
    outgoing: Pipeline,
    target: Pipeline,
    kind: str,
    evaluation_id: int | None,
    override_reason: str | None,
) -> None:
    plan, source = current_plan(session, target)
    session.query(_SERVE, ["bigint", "bigint"], target.pipeline_id, target.version.version_id)
    published.write_routing(session, target)
    leaving, coming = outgoing.version, target.version
    cutover_id = session.scalar(
        _LOG,
        ["bigint", "text", "bigint", "bigint", "integer", "integer", "bigint", "text"],
        target.pipeline_id, kind, leaving.version_id, coming.version_id, leaving.number, coming.number, evaluation_id,
        override_reason,
    )  # fmt: skip
    if leaving.state == "backfilling":
        # What reads the source belongs to the version that serves: it goes on.
        session.query(_GO_ON, ["bigint"], coming.version_id)
    if kind == "cutover":
        # All callers have it now; those kept on another version on purpose stay there.
        for table in ("embedline.traffic", "embedline.traffic_tenant"):
            session.query(f"DELETE FROM {table} WHERE version_id = $1", ["bigint"], target.version.version_id)
    write_serving_function(session, plan, target.version.number)
    started = time.monotonic()
    show = showing(session, target, partial(show_version, session, target, plan, source))
    retry_locked(session, show, "the routing view", _SWAP_SECONDS)
    session.query(
        "UPDATE embedline.cutover SET swap_seconds = $2 WHERE cutover_id = $1",
        ["bigint", "double precision"], cutover_id, time.monotonic() - started,
    )  # fmt: skip
