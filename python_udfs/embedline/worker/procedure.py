"""The two forms of the worker: embed_pending in one transaction, and the resident worker that commits as it goes."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait

from embedline.catalog.health import contain, note_fault
from embedline.catalog.load import Pipeline, load_active_pipelines, load_lanes, load_some
from embedline.catalog.settings import load_settings
from embedline.catalog.source import hidden_source
from embedline.documents import documents
from embedline.errors import EmbedlineError, InvalidParameter
from embedline.models import circuit
from embedline.postgres.session import (
    CHANGED_TABLE,
    ENDING,
    SLOT_LOCK_CLASS,
    WORKER_LOCK_CLASS,
    Plpy,
    Session,
    SessionCache,
    entry_point,
    in_plain_words,
    postgres_error,
    prepare_environment,
    sqlstate_of,
)
from embedline.queue import backfill, chunk_queue, inbox, signals
from embedline.worker.batch import Batch
from embedline.worker.batch_size import Turns
from embedline.worker.claim import Claimant
from embedline.worker.engine import Engine, now_and_then
from embedline.worker.index_maintenance import maintain_contained, unfinished
from embedline.worker.resident import PASSING_FAULTS, ResidentWorker, Step

_BATCH_ROWS = 1000
_POLL_SECONDS = (0.05, 1.0)
# A poll may take this share of the time, and this of a core: an outbox full of dead rows (a long transaction pins them) is
# polled less often, and 1,000 pipelines cost no more than one.
_POLL_COST_SHARE, _POLL_CORE_SHARE = 0.1, 0.02
# Waits are interrupted so often, to let a cancel through; chunking no more often, for each time is a transaction.
_CANCEL_SECONDS = 0.1
# A claim is given back in so many tries; each waits for up to two seconds. At the end of the CALL it is free anyway.
_ABANDON_TRIES = 10
# embed_pending waits no longer for a rate limit: its caller waits, too.
_PATIENCE_SECONDS = 2.0
# Objects made before Python looks for cycles: a batch is some ten thousand objects without any, and at the default of 700
# looking through them again and again took a tenth of a worker's time.
_COLLECTION_THRESHOLD = 50_000
# Pipelines that one embed_pending maintains beside those it worked on, and whose signals it takes away.
_MAINTAINED, _CLEARED = 16, 64
_CACHE_KEY = "embedline.worker"
_PLAN_KEY = "embedline.worker_step"
# Whose turn it is for embed_pending, from one call to the next.
_TURNS_KEY = "embedline.turns"


@entry_point
def embed_pending(session: Session, max_rows: int, pipeline_name: str | None) -> int:
    """Embed up to `max_rows` source rows inside the caller's transaction: live changes first, but not them alone."""
    if max_rows < 1:
        raise InvalidParameter("max_rows must be at least 1", hint="SELECT embed_pending(1000);")
    prepare_environment()
    run = _Run(session, max_rows, pipeline_name)
    # Where changes come faster than calls, every call leaves something for the backfill.
    run.embed(_live_rows(session, max_rows), embed_backfill=False)
    is_through = False
    while not is_through:
        is_drained = run.embed(max_rows, embed_backfill=True)
        # Another pipeline's backlog keeps no backfill open. Where the sweep that closes one finds rows, they are next.
        is_through = not run.close_backfills() or not is_drained
    run.clear_signals()
    pipelines = run.all_pipelines()
    for pipeline in run.to_maintain(pipelines):
        maintain_contained(session, pipeline)
    for pipeline in pipelines:
        if pipeline.is_hidden and (hidden := hidden_source(session, pipeline.source_oid)):
            session.plpy.warning(f'pipeline "{pipeline.name}" is held back: {hidden}', hint=hidden.hint or "")
        if circuit.is_open(session, pipeline.version.model.model_id):
            session.plpy.warning(f'model "{pipeline.version.model.config.name}" is unavailable; its rows stay queued')
    if run.refusal is not None:
        session.plpy.warning(f"{run.refusal}; the rows stay queued")
    return run.embedded


def _live_rows(session: Session, max_rows: int) -> int:
    """Return how many live changes go before the backfill. A claim passes its limit to the end of an inbox row."""
    rows = math.ceil(max_rows * load_settings(session).live_share)
    return rows - rows % inbox.KEYS_PER_ROW if rows > inbox.KEYS_PER_ROW else rows


class _Run:
    """One call of embed_pending."""

    def __init__(self, session: Session, max_rows: int, pipeline_name: str | None) -> None:
        self.embedded = 0
        self._session = session
        self._max_rows = max_rows
        self._pipeline_name = pipeline_name
        self._engine = Engine(session, None, _PATIENCE_SECONDS)
        turns = session.cache.setdefault(_TURNS_KEY, Turns())
        # Live changes have had their share when the backfill's turn comes.
        self._claimant = Claimant(session, None, live_share=0.0, turns=turns)
        self._examined = 0
        self._batch_rows = _BATCH_ROWS
        self._written = Counter[int]()
        # Pipelines that failed in this call: they are left alone, and the others go on.
        self._failed: set[int] = set()
        self._claimed: Batch | None = None
        # Those that may have something left, None before the first claim; and those that were embedded.
        self._left: set[int] | None = None
        # The versions beside the serving one, by pipeline: its new chunks wait for them.
        self._lanes = defaultdict[int, set[int]](set)
        self._worked: set[int] = set()

    def all_pipelines(self) -> list[Pipeline]:
        """The pipelines that are embedded."""
        # Versions beside the serving ones come last: their backfills can be closed only after those.
        found = [
            *load_active_pipelines(self._session, self._pipeline_name),
            *load_lanes(self._session, self._pipeline_name),
        ]
        for pipeline in found:
            if pipeline.is_lane:
                self._lanes[pipeline.pipeline_id].add(pipeline.lane_id)
        return [pipeline for pipeline in found if pipeline.lane_id not in self._failed]

    def _pipelines_left(self) -> list[Pipeline]:
        """Those that may have something to claim: of 1,000 pipelines each batch must not load all."""
        if self._left is None:
            return self.all_pipelines()
        return load_some(self._session, self._left - self._failed)

    def to_maintain(self, pipelines: list[Pipeline]) -> list[Pipeline]:
        """Those that were written to or have something unfinished, and a few others: each call may hold so many locks."""
        wanted = self._worked | set(unfinished(self._session, self._pipeline_name))
        others = [pipeline for pipeline in pipelines if pipeline.pipeline_id not in wanted]
        some = random.sample(others, min(len(others), _MAINTAINED))
        return [pipeline for pipeline in pipelines if pipeline.pipeline_id in wanted] + some

    def clear_signals(self) -> None:
        """Take away the signals of what is embedded; without a resident worker no other session does.

        Under a stricter isolation others' signals could not be told from those that this transaction cannot see.
        """
        if self._session.scalar("SELECT current_setting('transaction_isolation')") != "read committed":
            return
        asked = signals.ask(self._session, None, self._pipeline_name)
        for pipeline in load_some(self._session, [i for i in asked.signalled if i not in self._failed][:_CLEARED]):
            if documents.can_hold_source(self._session, pipeline):
                signals.clear(self._session, pipeline, asked.at, asked.live)

    @property
    def refusal(self) -> str | None:
        """Why a budget or a rate limit has kept rows back, where it has."""
        return self._engine.refusal

    def embed(self, limit: int, *, embed_backfill: bool) -> bool:
        """Embed until nothing can be claimed (True) or `limit` rows of this call are embedded (False)."""
        # Rows that end as dead letters or need no embedding do not count as embedded, so a run of them must not end the
        # work; ten times max_rows bounds the transaction all the same.
        self._left = None
        while self.embedded < limit and self._examined < 10 * self._max_rows:
            self._batch_rows = min(_BATCH_ROWS, limit - self.embedded)
            found = self._pipelines_left()
            # A new session knows of no turns: whoever begins, it must not always be the same.
            random.shuffle(found)
            self._claimed = None
            try:
                # Of a batch that fails the claim is undone, too.
                with self._session.plpy.subtransaction():
                    self._claim_and_embed(found, embed_backfill=embed_backfill)
            except (self._session.plpy.SPIError, EmbedlineError) as error:
                self._leave_alone(error)
                continue
            if self._claimed is None:
                if not self._claimant.has_removed:
                    return True
                # More may be removed now.
                self._left = None
        return False

    def _claim_and_embed(self, found: list[Pipeline], *, embed_backfill: bool) -> None:
        batch = self._claimant.claim(found, self._rows, is_idle=True, embed_backfill=embed_backfill)
        self._claimed = batch
        self._left = {pipeline.lane_id for pipeline in found} - set(self._claimant.asked)
        if batch is not None:
            self._worked.add(batch.pipeline.pipeline_id)
            self._examined += max(len(batch.rows), 1)
            self.embedded += self._embed_batch(batch)
            # Asked before, they had nothing; rows that were cut just now are theirs to embed, too.
            self._left |= self._lanes[batch.pipeline.pipeline_id]

    def _leave_alone(self, error: Exception) -> None:
        """Say what failed of one pipeline, in its status and as a WARNING, and go on without it."""
        pipeline = self._claimed.pipeline if self._claimed is not None else self._claimant.asking
        for future in self._claimed.futures if self._claimed is not None else ():
            future.cancel()
        # A serialization failure or a deadlock is the transaction's, not the pipeline's.
        if pipeline is None or sqlstate_of(error) in ENDING or sqlstate_of(error)[:2] == "40":
            raise error
        self._failed.add(pipeline.lane_id)
        note_fault(self._session, pipeline, str(error))
        self._session.plpy.warning(f"embedline, pipeline {pipeline.name}: {error}")

    def _rows(self, pipeline: Pipeline) -> int:
        return self._batch_rows

    def close_backfills(self) -> bool:
        """Close the backfills that are read through; True where there turns out to be more to do."""
        open_ones = [p for p in self.all_pipelines() if p.version.state == "backfilling" and not p.is_hidden]
        return any([self._close(pipeline) for pipeline in open_ones])

    def _close(self, pipeline: Pipeline) -> bool:
        """Close one backfill; where that fails the other pipelines go on."""
        close = chunk_queue.close if pipeline.is_lane else backfill.close_backfill
        return contain(self._session, pipeline, lambda: close(self._session, pipeline))

    def _embed_batch(self, batch: Batch) -> int:
        self._engine.run(batch)
        self._written[batch.pipeline.lane_id] += batch.embedded_count
        if documents.analyze_grown(self._session, batch.pipeline, self._written[batch.pipeline.lane_id]):
            self._written[batch.pipeline.lane_id] = 0
        return batch.embedded_count


@entry_point
def worker_step(session: Session, step: Step, slot: int | None, pipeline_name: str | None, message: str | None) -> str:
    """Run one step of this session's resident worker; called by run_worker alone, between commits."""
    if step == "begin":
        return _begin(session, slot, pipeline_name)
    resident: ResidentWorker | None = session.cache.get(_CACHE_KEY)
    if resident is None:
        raise InvalidParameter("no worker runs in this session", hint="CALL embedline.run_worker();")
    resident.use(session)
    if step == "claim":
        return resident.claim()
    if step == "report":
        return resident.report()
    if step == "is_waiting":
        return "yes" if resident.is_waiting() else "no"
    if step == "end":
        resident.release_all()
        session.query("DELETE FROM embedline.worker WHERE worker_id = $1", ["integer"], resident.worker_id)
        del session.cache[_CACHE_KEY]
        return "done"
    if step == "fault":
        resident.note_fault(message or "")
        return "done"
    if step == "abandon" and message:
        resident.note_error(message)
    return resident.step(step)


def _begin(session: Session, slot: int | None, pipeline_name: str | None) -> str:
    prepare_environment()
    if pipeline_name is not None:
        load_active_pipelines(session, pipeline_name)
    worker_id = int(session.scalar("SELECT nextval('embedline.worker_id_seq')"))
    # Known to the session before the lock is held: whatever happens next, the end finds what it has to free.
    session.cache[_CACHE_KEY] = ResidentWorker(session, worker_id, pipeline_name)
    session.query("SELECT pg_advisory_lock($1, $2)", ["integer", "integer"], WORKER_LOCK_CLASS, worker_id)
    signals.renew(session)
    signals.note_dead_workers(session)
    session.query(
        "INSERT INTO embedline.worker (worker_id, slot, pid) VALUES ($1, $2, pg_backend_pid())",
        ["integer", "integer"],
        worker_id,
        slot,
    )
    return "done"


def run_worker(
    plpy: Plpy,
    cache: SessionCache,
    max_seconds: float | None,
    pipeline_name: str | None,
    slot: int | None,
    until_idle: bool,
) -> None:
    """Loop of a resident worker: the body of a procedure, which commits between the steps.

    Steps run as the SECURITY DEFINER function embedline._worker_step, because a procedure that commits can be neither
    SECURITY DEFINER nor have a pinned search_path.
    """
    if max_seconds is None or math.isnan(max_seconds):
        # The loop would never end.
        refusal = InvalidParameter("max_seconds must be a number", hint="CALL embedline.run_worker(max_seconds => 60);")
        raise postgres_error(plpy, refusal)
    if _CACHE_KEY in cache:
        # An earlier CALL of this session ended by an error that could not be handled.
        _end(plpy, cache)
    if slot is not None and not _lock_slot(plpy, slot):
        return
    # A worker sees what others have committed since, and locks it: under a stricter default it would fail at that.
    before = _set(plpy, {"jit": "off", "default_transaction_isolation": "read committed"})
    plpy.commit()
    thresholds = gc.get_threshold()
    told: BaseException | None = None
    try:
        gc.set_threshold(_COLLECTION_THRESHOLD)
        _step(plpy, cache, "begin", slot, pipeline_name)
        plpy.commit()
        _loop(plpy, cache, time.monotonic() + max_seconds, until_idle)
        if until_idle:
            # For the client that waits for it; a scheduled worker has none. `embedline worker` reads this, too.
            plpy.notice(f"embedline worker: {cache[_CACHE_KEY].embedded}")
    except Exception as error:
        if not sqlstate_of(error):
            raise
        told = in_plain_words(plpy, error)
        raise told from None
    finally:
        gc.set_threshold(*thresholds)
        # After pg_terminate_backend this cannot run any more: then the freed lock itself gives the claims back.
        with contextlib.suppress(Exception):
            plpy.rollback()
        if _CACHE_KEY in cache:
            _end(plpy, cache)
        if slot is not None:
            plpy.execute(f"SELECT pg_catalog.pg_advisory_unlock({SLOT_LOCK_CLASS}, {int(slot)})")
        with contextlib.suppress(Exception):
            # Behind a pool the next client has this session.
            _set(plpy, before)
        plpy.commit()
        if told is not None:
            # As database.entry_point does: no frames under an error that is meant for the caller.
            told.__traceback__ = None


def _set(plpy: Plpy, settings: dict[str, str]) -> dict[str, str]:
    """Set the session's settings, and return what they were."""
    before = {}
    for name, value in settings.items():
        plan = plpy.prepare(
            "SELECT pg_catalog.current_setting($1) AS before, pg_catalog.set_config($1, $2, false)", ["text", "text"]
        )
        before[name] = str(plpy.execute(plan, [name, value])[0]["before"])
    return before


def _lock_slot(plpy: Plpy, slot: int) -> bool:
    row = plpy.execute(f"SELECT pg_catalog.pg_try_advisory_lock({SLOT_LOCK_CLASS}, {int(slot)}) AS locked")
    return bool(row[0]["locked"])


def _end(plpy: Plpy, cache: SessionCache) -> None:
    worker_id = cache[_CACHE_KEY].worker_id
    try:
        _step(plpy, cache, "end")
        plpy.commit()
    finally:
        cache.pop(_CACHE_KEY, None)
        plpy.execute(f"SELECT pg_catalog.pg_advisory_unlock({WORKER_LOCK_CLASS}, {int(worker_id)})")


def _loop(plpy: Plpy, cache: SessionCache, deadline: float, until_idle: bool) -> None:
    resident: ResidentWorker = cache[_CACHE_KEY]
    claim_at = 0.0
    while True:
        resident.is_ending = resident.is_ending or time.monotonic() >= deadline
        if not resident.is_ending and time.monotonic() >= claim_at and resident.has_room:
            started, core_started = time.monotonic(), time.process_time()
            state = _claim(plpy, cache, resident)
            if state == "work":
                _take_in(plpy, cache, resident)
            elif state == "stop":
                resident.is_ending = True
            elif state == "idle":
                if until_idle and not resident.batches and _step(plpy, cache, "is_waiting") == "no":
                    return
                pause = max(
                    (time.monotonic() - started) / _POLL_COST_SHARE,
                    (time.process_time() - core_started) / _POLL_CORE_SHARE,
                    _POLL_SECONDS[0],
                )
                claim_at = time.monotonic() + min(pause, _POLL_SECONDS[1])
        elif resident.is_report_due:
            resident.is_ending = _step(plpy, cache, "report") == "stop" or resident.is_ending
            plpy.commit()
        if resident.has_answers:
            _write(plpy, cache, resident)
            if until_idle and not resident.batches:
                # Whether that was all is not a matter for the next poll.
                claim_at = 0.0
        elif resident.is_ending and not resident.batches:
            return
        elif resident.is_ending or time.monotonic() < claim_at or not resident.has_room:
            _rest(plpy, resident, claim_at)


def _claim(plpy: Plpy, cache: SessionCache, resident: ResidentWorker) -> str:
    """Claim the next batch; a pipeline of which that fails is left alone for a while, and the others go on."""
    try:
        state = _step(plpy, cache, "claim")
        plpy.commit()
        return state
    except Exception as error:
        pipeline = resident.claimant.asking
        if sqlstate_of(error) in ENDING or pipeline is None:
            raise
        plpy.rollback()
        resident.undo()
        resident.failed(pipeline, sqlstate_of(error))
        _note_fault(plpy, cache, str(error))
        plpy.warning(f"embedline worker, pipeline {pipeline.name}: {error}")
        plpy.commit()
        return "again"


def _note_fault(plpy: Plpy, cache: SessionCache, message: str) -> None:
    """Show in embedline.status why nothing could be claimed of a pipeline; that this fails, too, ends no worker."""
    try:
        _step(plpy, cache, "fault", message=message)
        plpy.commit()
    except Exception as error:
        if sqlstate_of(error) in ENDING:
            raise
        plpy.rollback()


def _rest(plpy: Plpy, resident: ResidentWorker, claim_at: float) -> None:
    """Wait for an answer or the next poll. No transaction is open; each look for a cancel is one of its own."""
    until_claim = claim_at - time.monotonic()
    if futures := resident.futures:
        # Without room for another batch there is nothing to poll for.
        seconds = min(until_claim, _CANCEL_SECONDS) if until_claim > 0 else _CANCEL_SECONDS
        wait(futures, timeout=seconds, return_when=FIRST_COMPLETED)
        _breathe(plpy)
    else:
        seconds = min(max(until_claim, _POLL_SECONDS[0]), _POLL_SECONDS[1])
        plpy.execute(f"SELECT pg_catalog.pg_sleep({seconds:.3f})")
        plpy.commit()


def _take_in(plpy: Plpy, cache: SessionCache, resident: ResidentWorker) -> None:
    """Read, chunk and submit the batch that was just claimed."""

    def take_in() -> None:
        is_done = _step(plpy, cache, "read") == "done"
        plpy.commit()
        if is_done:
            # Chunking a large document takes seconds: no transaction is open, and a cancel gets through.
            resident.chunk(now_and_then(lambda: _breathe(plpy)))
            is_done = _step(plpy, cache, "submit") == "done"
            plpy.commit()
        if is_done:
            resident.start()
        else:
            _abandon(plpy, cache, resident, None)

    _guarded(plpy, cache, resident, take_in, can_wait=False)


def _write(plpy: Plpy, cache: SessionCache, resident: ResidentWorker) -> None:
    """Write what has come back, in one transaction."""

    def write() -> None:
        started = time.monotonic()
        written = _step(plpy, cache, "write") == "written"
        plpy.commit()
        resident.start()
        if written:
            resident.wrote(time.monotonic() - started)

    _guarded(plpy, cache, resident, write, can_wait=True)


def _guarded(
    plpy: Plpy, cache: SessionCache, resident: ResidentWorker, work: Callable[[], None], *, can_wait: bool
) -> None:
    """Do a step. A fault gives the batch back; one that will pass only puts a write off: it `can_wait`, the answers are here."""
    try:
        work()
    except Exception as error:
        sqlstate = sqlstate_of(error)
        if sqlstate in ENDING:
            raise
        plpy.rollback()
        resident.undo()
        if can_wait and sqlstate in PASSING_FAULTS and resident.put_off_write():
            return
        if resident.current is not None:
            resident.count_fault(resident.current.pipeline, sqlstate)
        _abandon(plpy, cache, resident, f"{type(error).__name__}: {error}")
        plpy.warning(f"embedline worker: {error}")


def _abandon(plpy: Plpy, cache: SessionCache, resident: ResidentWorker, message: str | None) -> None:
    for tries_left in reversed(range(_ABANDON_TRIES)):
        try:
            _step(plpy, cache, "abandon", message=message)
            plpy.commit()
            return
        except Exception as error:
            sqlstate = sqlstate_of(error)
            if sqlstate in CHANGED_TABLE:
                # The pipeline was dropped meanwhile, or follows another key, and its claims went with that.
                plpy.rollback()
                resident.forget_current()
                plpy.commit()
                return
            if sqlstate not in PASSING_FAULTS or not tries_left:
                raise
            plpy.rollback()


def _breathe(plpy: Plpy) -> None:
    plpy.execute("SELECT 1")
    plpy.commit()


def _step(
    plpy: Plpy,
    cache: SessionCache,
    step: Step,
    slot: int | None = None,
    pipeline_name: str | None = None,
    message: str | None = None,
) -> str:
    # One plan for all steps: each plpy.prepare takes memory that only the end of the CALL gives back.
    if _PLAN_KEY not in cache:
        types = ["text", "integer", "text", "text"]
        cache[_PLAN_KEY] = plpy.prepare("SELECT embedline._worker_step($1, $2, $3, $4) AS state", types)
    return str(plpy.execute(cache[_PLAN_KEY], [step, slot, pipeline_name, message])[0]["state"])
