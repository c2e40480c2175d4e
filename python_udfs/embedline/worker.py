"""The two forms of the worker: embed_pending in one transaction, and the resident worker that commits as it goes."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Literal

from embedline import backfill, circuit, indexing, outbox, schedule
from embedline.catalog import Pipeline, load_active_pipelines
from embedline.database import (
    SLOT_LOCK_CLASS,
    WORKER_LOCK_CLASS,
    Plpy,
    Session,
    SessionCache,
    entry_point,
    prepare_environment,
    quote_literal,
)
from embedline.embedder_pool import let_cancel_through, wait_first
from embedline.engine import Batch, Engine
from embedline.errors import InvalidParameter

_BATCH_ROWS = 1000
_POLL_SECONDS = (0.05, 1.0)
# A poll may cost this share of the time: an outbox full of dead rows (a long transaction pins them) is polled less often.
_POLL_COST_SHARE = 0.1
_MAINTENANCE_SECONDS = 5.0
_LAUNCHER_SECONDS = 1.0
_WRITE_LOCK_TIMEOUT = "2s"
_CACHE_KEY = "embedline.worker"

Step = Literal["begin", "claim", "read", "submit", "write", "finish", "abandon", "end"]


@entry_point
def embed_pending(session: Session, max_rows: int, pipeline_name: str | None) -> int:
    """Embed up to `max_rows` source rows inside the caller's transaction: live changes first, then backfill."""
    if max_rows < 1:
        raise InvalidParameter("max_rows must be at least 1", hint="SELECT embed_pending(1000);")
    prepare_environment()
    engine = Engine(session, None)
    on_wait = let_cancel_through(session)
    embedded = examined = 0
    # Rows that end as dead letters or need no embedding do not count as embedded, so a run of them must not end the
    # work; ten times max_rows bounds the transaction all the same.
    for is_backfill in (False, True):
        while embedded < max_rows and examined < 10 * max_rows:
            pipelines = load_active_pipelines(session, pipeline_name)
            batch = engine.claim(pipelines, min(_BATCH_ROWS, max_rows - embedded), backfill=is_backfill)
            if batch is None:
                if is_backfill and any([backfill.close_backfill(session, pipeline) for pipeline in pipelines]):
                    embedded += _drain_swept(engine, pipelines, max_rows - embedded)
                break
            examined += max(len(batch.rows), 1)
            embedded += _run_batch(engine, batch, on_wait)
    for pipeline in load_active_pipelines(session, pipeline_name):
        indexing.maintain(session, pipeline)
        if circuit.is_open(session, pipeline.version.model.model_id):
            session.plpy.warning(f'model "{pipeline.version.model.config.name}" is unavailable; its rows stay queued')
    return embedded


def _drain_swept(engine: Engine, pipelines: list[Pipeline], max_rows: int) -> int:
    embedded = 0
    on_wait = let_cancel_through(engine.session)
    while embedded < max_rows:
        batch = engine.claim(pipelines, min(_BATCH_ROWS, max_rows - embedded), backfill=False)
        if batch is None:
            break
        embedded += _run_batch(engine, batch, on_wait)
    for pipeline in pipelines:
        backfill.close_backfill(engine.session, pipeline)
    return embedded


def _run_batch(engine: Engine, batch: Batch, on_wait: Any) -> int:
    engine.read(batch)
    engine.chunk(batch, on_wait)
    engine.submit(batch)
    while batch.units:
        if not engine.write_ready(batch):
            wait_first(batch.futures, on_wait)
    engine.finish(batch)
    return batch.embedded_count


class ResidentWorker:
    """State of a resident worker between its steps, each of which is one short transaction."""

    def __init__(self, session: Session, worker_id: int, pipeline_name: str | None) -> None:
        self.worker_id = worker_id
        self.pipeline_name = pipeline_name
        self.engine = Engine(session, worker_id)
        self.batch: Batch | None = None
        self._turn = 0
        self._maintain_at = 0.0
        self._launcher_at = 0.0

    def claim(self) -> str:
        """Claim the next batch; say "work", "idle" or "stop"."""
        session = self.engine.session
        if session.scalar(
            "SELECT stop_requested FROM embedline.worker WHERE worker_id = $1", ["integer"], self.worker_id
        ):
            return "stop"
        if time.monotonic() >= self._launcher_at:
            schedule.let_launcher_breathe(session)
            self._launcher_at = time.monotonic() + _LAUNCHER_SECONDS
        pipelines = load_active_pipelines(session, self.pipeline_name)
        # Each pipeline has its turn to be first, so that a busy one does not starve the others.
        self._turn += 1
        turned = (
            pipelines[self._turn % len(pipelines) :] + pipelines[: self._turn % len(pipelines)] if pipelines else []
        )
        self.batch = self.engine.claim(turned, _BATCH_ROWS, backfill=False) or self.engine.claim(
            turned, _BATCH_ROWS, backfill=True
        )
        if self.batch is not None:
            return "work"
        if any([backfill.close_backfill(session, pipeline) for pipeline in pipelines]):
            return "again"
        if time.monotonic() >= self._maintain_at:
            for pipeline in pipelines:
                indexing.maintain(session, pipeline)
            self._maintain_at = time.monotonic() + _MAINTENANCE_SECONDS
        return "idle"

    def step(self, step: Step) -> str:
        """Do one step of the current batch."""
        if self.batch is None:
            return "idle"
        session = self.engine.session
        session.execute(f"SET LOCAL lock_timeout = {quote_literal(_WRITE_LOCK_TIMEOUT)}")
        if step == "read":
            self.engine.read(self.batch)
        elif step == "submit":
            self.engine.submit(self.batch)
        elif step == "write":
            return "written" if self.engine.write_ready(self.batch) else "waiting"
        elif step == "finish":
            self.engine.finish(self.batch)
            self.batch = None
        elif step == "abandon":
            self.abandon()
        return "done"

    def abandon(self) -> None:
        """Give every claim of this worker back, uncounted."""
        session = self.engine.session
        for pipeline in load_active_pipelines(session, None):
            outbox.release_claims(session, pipeline, self.worker_id)
        self.batch = None


@entry_point
def worker_step(session: Session, step: Step, slot: int | None, pipeline_name: str | None, message: str | None) -> str:
    """Run one step of this session's resident worker; called by run_worker alone, between commits."""
    if step == "begin":
        return _begin(session, slot, pipeline_name)
    resident: ResidentWorker | None = session.cache.get(_CACHE_KEY)
    if resident is None:
        raise InvalidParameter("no worker runs in this session", hint="CALL embedline.run_worker();")
    # The wrapper's Session belongs to this call; plans and caches are shared through GD.
    resident.engine.session = session
    if step == "claim":
        return resident.claim()
    if step == "end":
        resident.abandon()
        session.query("DELETE FROM embedline.worker WHERE worker_id = $1", ["integer"], resident.worker_id)
        del session.cache[_CACHE_KEY]
        return "done"
    if step == "abandon" and message and resident.batch is not None:
        outbox.note_error(session, resident.batch.pipeline, message)
    return resident.step(step)


def _begin(session: Session, slot: int | None, pipeline_name: str | None) -> str:
    prepare_environment()
    if pipeline_name is not None:
        load_active_pipelines(session, pipeline_name)
    worker_id = int(session.scalar("SELECT nextval('embedline.worker_id_seq')"))
    # Known to the session before the lock is held: whatever happens next, the end finds what it has to free.
    session.cache[_CACHE_KEY] = ResidentWorker(session, worker_id, pipeline_name)
    session.query("SELECT pg_advisory_lock($1, $2)", ["integer", "integer"], WORKER_LOCK_CLASS, worker_id)
    session.query(
        """
        DELETE FROM embedline.worker AS w WHERE NOT EXISTS (
            SELECT FROM pg_locks AS l WHERE l.locktype = 'advisory' AND l.classid = $1::bigint::oid AND l.objsubid = 2
                AND l.objid = w.worker_id::bigint::oid)
        """,
        ["bigint"],
        WORKER_LOCK_CLASS,
    )
    session.query(
        "INSERT INTO embedline.worker (worker_id, slot, pid) VALUES ($1, $2, pg_backend_pid())",
        ["integer", "integer"],
        worker_id,
        slot,
    )
    return "done"


def run_worker(
    plpy: Plpy, cache: SessionCache, max_seconds: float, pipeline_name: str | None, slot: int | None, until_idle: bool
) -> None:
    """Loop of a resident worker: the body of a procedure, which commits between the steps.

    Steps run as the SECURITY DEFINER function embedline._worker_step, because a procedure that commits can be neither
    SECURITY DEFINER nor have a pinned search_path.
    """
    if _CACHE_KEY in cache:
        # An earlier CALL of this session ended by an error that could not be handled.
        _end(plpy, cache)
    if slot is not None and not _lock_slot(plpy, slot):
        return
    plpy.execute("SELECT pg_catalog.set_config('jit', 'off', false)")
    try:
        _step(plpy, "begin", slot, pipeline_name)
        plpy.commit()
        _loop(plpy, cache, time.monotonic() + max_seconds, until_idle)
    finally:
        # After pg_terminate_backend this cannot run any more: then the freed lock itself gives the claims back.
        with contextlib.suppress(Exception):
            plpy.rollback()
        if _CACHE_KEY in cache:
            _end(plpy, cache)
        if slot is not None:
            plpy.execute(f"SELECT pg_catalog.pg_advisory_unlock({SLOT_LOCK_CLASS}, {int(slot)})")
        plpy.commit()


def _lock_slot(plpy: Plpy, slot: int) -> bool:
    row = plpy.execute(f"SELECT pg_catalog.pg_try_advisory_lock({SLOT_LOCK_CLASS}, {int(slot)}) AS locked")
    return bool(row[0]["locked"])


def _end(plpy: Plpy, cache: SessionCache) -> None:
    worker_id = cache[_CACHE_KEY].worker_id
    try:
        _step(plpy, "end")
        plpy.commit()
    finally:
        cache.pop(_CACHE_KEY, None)
        plpy.execute(f"SELECT pg_catalog.pg_advisory_unlock({WORKER_LOCK_CLASS}, {int(worker_id)})")


def _loop(plpy: Plpy, cache: SessionCache, deadline: float, until_idle: bool) -> None:
    while time.monotonic() < deadline:
        started = time.monotonic()
        state = _step(plpy, "claim")
        plpy.commit()
        if state == "stop":
            return
        if state == "work":
            _work(plpy, cache)
        elif state == "idle":
            if until_idle and not _has_waiting_rows(plpy):
                return
            pause = min(max((time.monotonic() - started) / _POLL_COST_SHARE, _POLL_SECONDS[0]), _POLL_SECONDS[1])
            plpy.execute(f"SELECT pg_catalog.pg_sleep({pause:.3f})")
            plpy.commit()


def _has_waiting_rows(plpy: Plpy) -> bool:
    row = plpy.execute(
        "SELECT pg_catalog.sum(s.pending) AS pending FROM embedline.status AS s WHERE s.state = 'active'"
    )
    return bool(row[0]["pending"])


def _work(plpy: Plpy, cache: SessionCache) -> None:
    try:
        _step(plpy, "read")
        plpy.commit()
        resident: ResidentWorker = cache[_CACHE_KEY]
        batch = resident.batch
        if batch is None:
            return
        # Chunking a large document takes seconds: no transaction is open, and a cancel gets through.
        resident.engine.chunk(batch, lambda: _breathe(plpy))
        _step(plpy, "submit")
        plpy.commit()
        while batch.units:
            state = _step(plpy, "write")
            plpy.commit()
            if state == "waiting":
                # No transaction is open while a provider works; each look for a cancel is one of its own.
                wait_first(batch.futures, lambda: _breathe(plpy))
        _step(plpy, "finish")
        plpy.commit()
    except Exception as error:
        if getattr(error, "sqlstate", None) in ("57014", "57P01", "57P02", "57P03"):
            raise
        plpy.rollback()
        _step(plpy, "abandon", message=f"{type(error).__name__}: {error}")
        plpy.commit()
        plpy.warning(f"embedline worker: {error}")
        plpy.execute("SELECT pg_catalog.pg_sleep(1)")
        plpy.commit()


def _breathe(plpy: Plpy) -> None:
    plpy.execute("SELECT 1")
    plpy.commit()


def _step(
    plpy: Plpy, step: Step, slot: int | None = None, pipeline_name: str | None = None, message: str | None = None
) -> str:
    plan = plpy.prepare("SELECT embedline._worker_step($1, $2, $3, $4) AS state", ["text", "integer", "text", "text"])
    return str(plpy.execute(plan, [step, slot, pipeline_name, message])[0]["state"])
