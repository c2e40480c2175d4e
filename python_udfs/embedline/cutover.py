"""Cutting over to another version, and back: gates first, then one swap of the routing view and the catalogue.

The swap is the last thing that a call does: the routing view is locked for milliseconds, and readers wait no longer than one
try for that lock (database.retry_locked). Workers' writes are kept out while the version catches up with the last chunks, so
nothing that the outgoing version shows is missing from the incoming one.
"""

from __future__ import annotations

import time

from embedline import coverage, routing, version_queue
from embedline.batch import Batch
from embedline.catalog import Pipeline, load_pipeline, load_version
from embedline.database import Session, change_versions, entry_point, prepare_environment, retry_locked
from embedline.engine import Engine
from embedline.errors import NotReady
from embedline.pipelines import current_plan, require_control

# So long a version may take to embed what was written in the last moments.
_CUTOVER_SECONDS, _ROLLBACK_SECONDS = 3.0, 3.0
_CATCH_UP_CHUNKS = 500
_PATIENCE_SECONDS = 0.0

_GATE = """
    SELECT e.evaluation_id, e.verdict, e.baseline_number FROM embedline.evaluation AS e
    JOIN embedline.pipeline AS p ON p.pipeline_id = e.pipeline_id
    JOIN embedline.version AS s ON s.version_id = p.serving_version_id
    WHERE e.version_id = $1 AND e.kind = 'gate' AND e.fingerprint = $2 AND e.baseline_number = s.number
    ORDER BY e.evaluation_id DESC LIMIT 1
"""
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
_LEFT = """
    SELECT coalesce(sum(cardinality(chunk_ids)), 0) AS count,
        bool_or(not_before <= clock_timestamp() AND crash_count = 0) AS is_due
    FROM embedline.version_queue WHERE version_id = $1 AND chunk_ids IS NOT NULL
"""


@entry_point
def cutover(session: Session, name: str, number: int, override_reason: str | None) -> None:
    """Have a version serve, if it is complete, indexed, and its gate has passed or is overridden with a reason."""
    require_control(session, name)
    target = load_version(session, name, number)
    if target.is_serving:
        session.plpy.notice(f'version {number} of pipeline "{name}" serves already')
        return
    coverage.require_coverage(session, target)
    coverage.require_index(session, target)
    evaluation_id = _require_gate(session, target, override_reason)
    routing.require_swappable(session, target)
    change_versions(session, target.pipeline_id)
    left = _catch_up(session, load_version(session, name, number), _CUTOVER_SECONDS)
    if left:
        raise NotReady(
            f'version {number} of pipeline "{name}" is {left} chunks behind',
            hint="Run it again when its workers have caught up:"
            f" SELECT queued, last_error FROM embedline.versions WHERE pipeline = '{name}' AND version = {number};",
        )
    _swap(session, load_pipeline(session, name), target, "cutover", evaluation_id, override_reason)


@entry_point
def rollback(session: Session, name: str) -> int:
    """Have the version serve again that served before; it was written with every change. Return its number."""
    require_control(session, name)
    pipeline = load_pipeline(session, name)
    number = session.scalar(_CAME_FROM, ["bigint"], pipeline.version.version_id)
    if number is None:
        raise NotReady(
            f'there is no version that pipeline "{name}" could go back to',
            detail=f"Version {pipeline.version.number} was never cut over to, or the one before it is dropped.",
            hint=f"SELECT * FROM embedline.versions WHERE pipeline = '{name}'; lists the versions.",
        )
    change_versions(session, pipeline.pipeline_id)
    target = load_version(session, name, number)
    routing.require_swappable(session, target)
    left = _catch_up(session, target, _ROLLBACK_SECONDS)
    if left:
        session.plpy.warning(
            f"{left} chunks of the last changes follow within moments: version {number} is behind with them"
        )
    _swap(session, load_pipeline(session, name), target, "rollback", None, None)
    return int(number)


def _require_gate(session: Session, target: Pipeline, override_reason: str | None) -> int | None:
    """Return the evaluation that opens the cutover; raise where there is none and no reason to go without."""
    rows = session.query(_GATE, ["bigint", "text"], target.version.version_id, target.version.fingerprint)
    verdict = rows[0]["verdict"] if rows else None
    if verdict == "pass" or (override_reason or "").strip():
        return int(rows[0]["evaluation_id"]) if rows else None
    name, number = target.name, target.version.number
    raise NotReady(
        f'version {number} of pipeline "{name}" has no passing gate',
        detail=f"Its last evaluation is {verdict}."
        if verdict
        else "It was not evaluated against the version that serves.",
        hint=f"SELECT * FROM embedline.evaluate('{name}', {number}); or, to go without,"
        f" SELECT embedline.cutover('{name}', {number}, override_reason => '...');",
    )


def _catch_up(session: Session, target: Pipeline, seconds: float) -> int:
    """Embed the chunks that the version lacks yet, beside its workers; return how many are left after so long."""
    prepare_environment()
    engine = Engine(session, None, _PATIENCE_SECONDS)
    lane = target.as_lane()
    deadline = time.monotonic() + seconds
    while True:
        left = session.query(_LEFT, ["bigint"], lane.version.version_id)[0]
        if not left["count"] or not left["is_due"] or time.monotonic() > deadline:
            return int(left["count"])
        claim = version_queue.claim_lists(session, lane, _CATCH_UP_CHUNKS, None)
        if claim is None:
            # The rest is in workers' hands.
            session.execute("SELECT pg_sleep(0.005)")
        else:
            engine.run(Batch(lane, claim.rows, queue_ids=claim.queue_ids, of_backfill=claim.of_backfill))


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
    leaving, coming = outgoing.version, target.version
    cutover_id = session.scalar(
        _LOG,
        ["bigint", "text", "bigint", "bigint", "integer", "integer", "bigint", "text"],
        target.pipeline_id, kind, leaving.version_id, coming.version_id, leaving.number, coming.number, evaluation_id,
        override_reason,
    )  # fmt: skip
    if kind == "cutover":
        # Everybody has it now; whoever was kept back on purpose stays so.
        for table in ("embedline.traffic", "embedline.traffic_tenant"):
            session.query(f"DELETE FROM {table} WHERE version_id = $1", ["bigint"], target.version.version_id)
    routing.write_serving_function(session, target.pipeline_id, plan, target.version.number)
    started = time.monotonic()
    retry_locked(session, lambda: routing.show_version(session, target, plan, source), "the routing view")
    session.query(
        "UPDATE embedline.cutover SET swap_seconds = $2 WHERE cutover_id = $1",
        ["bigint", "double precision"], cutover_id, time.monotonic() - started,
    )  # fmt: skip
