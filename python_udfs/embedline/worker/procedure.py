"""The resident worker: a procedure that commits between its steps.

The steps run as a function of their own.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, wait

from embedline.catalog.load import load_active_pipelines
from embedline.core.processes import prepare_environment
from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point, in_plain_words, postgres_error
from embedline.postgres.locks import SLOT_LOCK_CLASS, WORKER_LOCK_CLASS
from embedline.postgres.session import Plpy, Session, SessionCache
from embedline.postgres.spans import start_exporters
from embedline.postgres.sqlstates import CHANGED_TABLE, ENDING, INSUFFICIENT_RESOURCES, QUERY_CANCELED, sqlstate_of
from embedline.worker import lease
from embedline.worker.engine import now_and_then
from embedline.worker.state import ResidentWorker
from embedline.worker.steps import Answer, Step
from embedline.worker.troubles import PASSING_FAULTS

# Seconds between two polls of an idle worker: at least, and at most.
_POLL_SECONDS = (0.05, 1.0)
# The share of the time, and of a core, that polls may take. An outbox full of dead rows (a long transaction pins them) is
# polled less often, and 1,000 pipelines cost no more than one.
_POLL_COST_SHARE, _POLL_CORE_SHARE = 0.1, 0.02
# Longest pause after maintenance. It takes 20 to 50 ms of a core now and then, for which a change would wait a second.
_LONGEST_AFTER_WORK_SECONDS = 0.25
# Seconds between two checks for a cancel; each is a transaction.
_CANCEL_SECONDS = 0.1
# Attempts to release a claim; each waits up to 2 s. The claim expires with the session anyway.
_ABANDON_TRIES = 10
# Objects created before Python searches for cycles. A batch is some ten thousand objects without any; at the default of 700
# the search took a tenth of a worker's time.
_COLLECTION_THRESHOLD = 50_000
_CACHE_KEY = "embedline.worker"
_PLAN_KEY = "embedline.worker_step"
# Every step but the first, which creates the worker. The message is that of the error which a step is about.
_HANDLERS: Mapping[Step, Callable[[ResidentWorker, str | None], Answer]] = {
    Step.CLAIM: lambda resident, _: resident.claim(),
    Step.READ: lambda resident, _: resident.read(),
    Step.SUBMIT: lambda resident, _: resident.submit(),
    Step.WRITE: lambda resident, _: resident.write(),
    Step.ABANDON: lambda resident, message: resident.abandon(message),
    Step.RECORD_FAULT: lambda resident, message: resident.record_fault(message or ""),
    Step.IS_WAITING: lambda resident, _: resident.is_waiting(),
    Step.REPORT: lambda resident, _: resident.report(),
    Step.END: lambda resident, _: resident.end(),
}


@entry_point
def worker_step(session: Session, step: str, slot: int | None, pipeline_name: str | None, message: str | None) -> str:
    """Run one step of this session's resident worker.

    Called by run_worker alone, between commits.
    """
    if step == Step.BEGIN:
        return _begin(session, slot, pipeline_name)
    resident: ResidentWorker | None = session.cache.get(_CACHE_KEY)
    if resident is None:
        raise InvalidParameter("no worker runs in this session", hint="CALL embedline.run_worker();")
    answer = _HANDLERS[Step(step)](resident, message)
    if step == Step.END:
        del session.cache[_CACHE_KEY]
    return answer


def _begin(session: Session, slot: int | None, pipeline_name: str | None) -> Answer:
    prepare_environment()
    if trouble := start_exporters(session):
        session.plpy.warning(f"embedline worker: {trouble}")
    if pipeline_name is not None:
        load_active_pipelines(session, pipeline_name)
    worker_id = lease.next_worker_id(session)
    # Known to the session before the lock is held: if the next statement fails, the end finds the lock to release.
    session.cache[_CACHE_KEY] = ResidentWorker(session, worker_id, pipeline_name)
    lease.take(session, worker_id, slot, None)
    return Answer.DONE


def run_worker(
    plpy: Plpy,
    cache: SessionCache,
    max_seconds: float | None,
    pipeline_name: str | None,
    slot: int | None,
    until_idle: bool,
) -> None:
    """Run the loop of a resident worker, with a commit after each step.

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
        _step(plpy, cache, Step.BEGIN, slot, pipeline_name)
        plpy.commit()
        _loop(plpy, cache, time.monotonic() + max_seconds, until_idle, is_scheduled=slot is not None)
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
        # After pg_terminate_backend this cannot run: then the end of the session lock frees the claims.
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
            # As entry_point does: no frames under an error that is meant for the caller.
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
        _step(plpy, cache, Step.END)
        plpy.commit()
    finally:
        cache.pop(_CACHE_KEY, None)
        plpy.execute(f"SELECT pg_catalog.pg_advisory_unlock({WORKER_LOCK_CLASS}, {int(worker_id)})")


def _loop(plpy: Plpy, cache: SessionCache, deadline: float, until_idle: bool, *, is_scheduled: bool) -> None:
    resident: ResidentWorker = cache[_CACHE_KEY]
    claim_at = 0.0
    while True:
        # No client waits for a scheduled worker, and its successor would pay again for answers that it cannot write now.
        is_needed = is_scheduled and any(batch.is_held_up for batch in resident.batches)
        resident.is_ending = resident.is_ending or (time.monotonic() >= deadline and not is_needed)
        if not resident.is_ending and time.monotonic() >= claim_at and resident.has_room:
            started, core_started = time.monotonic(), time.process_time()
            answer = _claim(plpy, cache, resident)
            if answer is Answer.BATCH:
                _prepare(plpy, cache, resident)
            elif answer is Answer.STOP:
                resident.is_ending = True
            elif answer is Answer.IDLE:
                if until_idle and not resident.batches and _step(plpy, cache, Step.IS_WAITING) is Answer.NO:
                    return
                now = time.monotonic(), time.process_time()
                polled_at = resident.polled_at or now
                pause = _pause(polled_at[0] - started, polled_at[1] - core_started)
                # What an idle worker does besides says little of the next poll.
                longer = min(_pause(now[0] - started, now[1] - core_started), _LONGEST_AFTER_WORK_SECONDS)
                claim_at = now[0] + max(pause, longer)
        elif resident.is_report_due:
            resident.is_ending = _report(plpy, cache) is Answer.STOP or resident.is_ending
        if resident.has_answers:
            _write(plpy, cache, resident)
            if until_idle and not resident.batches:
                # Ask at once whether that was all.
                claim_at = 0.0
        elif resident.is_ending and not resident.batches:
            return
        elif resident.is_ending or time.monotonic() < claim_at or not resident.has_room:
            _rest(plpy, resident, claim_at)


def _pause(seconds: float, core_seconds: float) -> float:
    """Return the seconds to the next poll after one that took so long."""
    pause = max(seconds / _POLL_COST_SHARE, core_seconds / _POLL_CORE_SHARE, _POLL_SECONDS[0])
    return min(pause, _POLL_SECONDS[1])


def _claim(plpy: Plpy, cache: SessionCache, resident: ResidentWorker) -> Answer:
    """Claim the next batch.

    If that fails, leave the source alone for a while, and go on with the others.
    """
    # Of the last step: if this one does not even begin, because Embedline was removed, it is no source's fault.
    resident.claimant.asking = None
    try:
        answer = _step(plpy, cache, Step.CLAIM)
        plpy.commit()
        return answer
    except Exception as error:
        source, sqlstate = resident.claimant.asking, sqlstate_of(error)
        if sqlstate in ENDING or (sqlstate not in PASSING_FAULTS and source is None):
            raise
        plpy.rollback()
        resident.undo()
        if source is None:
            # What a worker does besides claiming must not end one that keeps answers.
            return Answer.IDLE
        resident.claim_failed(source, sqlstate)
        _record_fault(plpy, cache, str(error))
        plpy.warning(f"embedline worker, pipeline {source.pipeline.name}: {error}")
        plpy.commit()
        return Answer.AGAIN


def _record_fault(plpy: Plpy, cache: SessionCache, message: str) -> None:
    """Show why nothing could be claimed of a source.

    A failure of this, too, ends no worker.
    """
    try:
        _step(plpy, cache, Step.RECORD_FAULT, message=message)
        plpy.commit()
    except Exception as error:
        if sqlstate_of(error) in ENDING:
            raise
        plpy.rollback()


def _report(plpy: Plpy, cache: SessionCache) -> Answer:
    """Ask whether to stop, and show this worker's state.

    A full disk or a lock must not end a worker that keeps answers until it can write them.
    """
    try:
        answer = _step(plpy, cache, Step.REPORT)
        plpy.commit()
        return answer
    except Exception as error:
        if sqlstate_of(error) not in PASSING_FAULTS:
            raise
        plpy.rollback()
        return Answer.DONE


def _rest(plpy: Plpy, resident: ResidentWorker, claim_at: float) -> None:
    """Wait for an answer or the next poll.

    No transaction is open; each check for a cancel is one of its own.
    """
    until_claim = claim_at - time.monotonic()
    if futures := resident.futures:
        # Without room for another batch there is nothing to poll for.
        seconds = min(until_claim, _CANCEL_SECONDS) if until_claim > 0 else _CANCEL_SECONDS
        wait(futures, timeout=seconds, return_when=FIRST_COMPLETED)
        _check_interrupts(plpy)
    else:
        seconds = min(max(until_claim, _POLL_SECONDS[0]), _POLL_SECONDS[1])
        plpy.execute(f"SELECT pg_catalog.pg_sleep({seconds:.3f})")
        plpy.commit()


def _prepare(plpy: Plpy, cache: SessionCache, resident: ResidentWorker) -> None:
    """Read, chunk and submit the batch that was just claimed."""

    def prepare() -> None:
        try:
            is_done = _step(plpy, cache, Step.READ) is Answer.DONE
        except Exception as error:
            if sqlstate_of(error) == QUERY_CANCELED and resident.current is not None:
                resident.cancelled_in = resident.current.source.key
            raise
        plpy.commit()
        if is_done:
            # Chunking a large document takes seconds: no transaction is open, and a cancel gets through.
            resident.chunk(now_and_then(lambda: _check_interrupts(plpy)))
            is_done = _step(plpy, cache, Step.SUBMIT) is Answer.DONE
            plpy.commit()
        if is_done:
            resident.start()
        else:
            _abandon(plpy, cache, resident, None)

    _guarded(plpy, cache, resident, prepare, can_wait=False)


def _write(plpy: Plpy, cache: SessionCache, resident: ResidentWorker) -> None:
    """Write what has come back, in one transaction."""

    def write() -> None:
        started = time.monotonic()
        is_written = _step(plpy, cache, Step.WRITE) is Answer.WRITTEN
        executed = time.monotonic()
        plpy.commit()
        committed = time.monotonic()
        resident.start()
        if is_written:
            resident.wrote(committed - started, committed - executed)

    _guarded(plpy, cache, resident, write, can_wait=True)


def _guarded(
    plpy: Plpy, cache: SessionCache, resident: ResidentWorker, work: Callable[[], None], *, can_wait: bool
) -> None:
    """Do a step.

    A fault releases the batch; one that passes only delays a write, which `can_wait`: the answers are kept.
    """
    try:
        work()
    except Exception as error:
        sqlstate = sqlstate_of(error)
        if sqlstate in ENDING:
            raise
        plpy.rollback()
        resident.undo()
        if can_wait and sqlstate in PASSING_FAULTS and resident.put_off_write(sqlstate):
            if sqlstate.startswith(INSUFFICIENT_RESOURCES):
                # A lock is free soon. A full disk needs a person, and PostgreSQL logs no error that is caught.
                plpy.warning(f"embedline worker: a write is put off: {error}")
            return
        if resident.current is not None:
            resident.count_fault(resident.current.source, sqlstate)
        _abandon(plpy, cache, resident, f"{type(error).__name__}: {error}")
        plpy.warning(f"embedline worker: {error}")


def _abandon(plpy: Plpy, cache: SessionCache, resident: ResidentWorker, message: str | None) -> None:
    for tries_left in reversed(range(_ABANDON_TRIES)):
        try:
            _step(plpy, cache, Step.ABANDON, message=message)
            plpy.commit()
            return
        except Exception as error:
            sqlstate = sqlstate_of(error)
            if sqlstate in CHANGED_TABLE:
                # The pipeline was dropped meanwhile, or follows another key, and its claims are gone.
                plpy.rollback()
                resident.forget_current()
                plpy.commit()
                return
            if sqlstate not in PASSING_FAULTS or not tries_left:
                raise
            plpy.rollback()


def _check_interrupts(plpy: Plpy) -> None:
    plpy.execute("SELECT 1")
    plpy.commit()


def _step(
    plpy: Plpy,
    cache: SessionCache,
    step: Step,
    slot: int | None = None,
    pipeline_name: str | None = None,
    message: str | None = None,
) -> Answer:
    # One plan for all steps: each plpy.prepare takes memory that only the end of the CALL frees.
    if _PLAN_KEY not in cache:
        types = ["text", "integer", "text", "text"]
        cache[_PLAN_KEY] = plpy.prepare("SELECT embedline._worker_step($1, $2, $3, $4) AS answer", types)
    return Answer(plpy.execute(cache[_PLAN_KEY], [str(step), slot, pipeline_name, message])[0]["answer"])
