"""The calls of a remote worker: claim, finish, fail, release.

Each is a transaction of its own. What a session has claimed is in its backend's memory, and marked as a worker's whose
lock the session holds. So a worker that loses its connection has lost its lease and can write nothing.
"""

from __future__ import annotations

from embedline.catalog.load import load_pipeline, load_version
from embedline.catalog.values import Pipeline
from embedline.core.embedding import EmbeddingBlock
from embedline.core.processes import prepare_environment
from embedline.embedders import create_embedder
from embedline.errors import (
    InputRejected,
    InvalidParameter,
    InvalidVectors,
    ModelChanged,
    NotReady,
    ProviderError,
    ProviderMisconfigured,
    TransientProviderError,
)
from embedline.models.pool import EMBEDDER_FACTORY
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.worker import lease
from embedline.worker.remote.desk import Desk, Order, RemoteEmbedder
from embedline.worker.remote.grants import require_grant
from embedline.worker.remote.worker import RemoteWorker

_KEY = "embedline.remote_worker"
# Key of the models that this session embeds with, by pipeline and version: those that it was told of or first claimed for.
_MODELS = "embedline.remote_models"
# Characters that are kept of what a remote worker says of a failure.
_DETAIL_LENGTH = 1000
# What still waits: rows of the serving version, chunks of another. $2 is the version.
_ROWS_WAITING = """
    SELECT s.pending + s.backfill_total - s.backfill_done FROM embedline.status AS s WHERE s.pipeline = $1 AND $2 IS NOT NULL
"""
_CHUNKS_WAITING = "SELECT v.missing FROM embedline.versions AS v WHERE v.pipeline = $1 AND v.version = $2"
_CLASSES = ("transient", "throttled", "unreachable", "rejected", "too_long", "misconfigured", "invalid_vectors")


class _Remote:
    """The remote worker of this session, and the transaction of its last call."""

    def __init__(self, worker: RemoteWorker, login: str) -> None:
        self.worker = worker
        self.login = login
        # Set while a call changes the worker: still set at the next one, that call failed.
        self.is_unsure = False
        # The transaction of the last call, if it has written anything.
        self.transaction: str | None = None


@entry_point
def remote_model(session: Session, name: str, number: int | None) -> str:
    """Return the model of a pipeline's version as JSON, without any key."""
    import json

    require_grant(session, name)
    pipeline = _pipeline(session, name, number)
    model = pipeline.version.model
    if _KEY not in session.cache:
        # While it has claims, the session goes on with the model that it has.
        session.cache.setdefault(_MODELS, {})[name, number] = model.model_id
    config = model.config
    facts = {
        "name": config.name,
        "provider": config.provider,
        "model": config.model,
        "dimensions": config.dimensions,
        "revision": config.revision,
        "base_url": config.base_url,
        "api_key_env": config.api_key_env,
        "document_prefix": config.document_prefix,
        "query_prefix": config.query_prefix,
        "max_batch_items": model.request_items,
        "max_batch_tokens": config.max_batch_tokens,
        "concurrency": config.concurrency,
        "timeout_seconds": config.timeout_seconds,
        "options": dict(config.options),
        "learned": dict(config.learned),
        "allowed_endpoints": list(config.allowed_endpoints),
    }
    waiting = session.scalar(
        _ROWS_WAITING if pipeline.is_serving else _CHUNKS_WAITING,
        ["text", "integer"],
        name,
        pipeline.version.number,
    )
    return json.dumps(
        {
            "config": facts,
            "fingerprint": model.probed_fingerprint,
            "version": pipeline.version.number,
            "waiting": waiting or 0,
        }
    )


@entry_point
def claim_batch(
    session: Session,
    name: str,
    version: int | None,
    max_rows: int | None,
    max_tokens: int | None,
    max_requests: int | None,
) -> list[dict[str, object]]:
    """Return texts to embed, or one row that says why there are none."""
    limits = {"max_rows": max_rows, "max_tokens": max_tokens, "max_requests": max_requests}
    for parameter, value in limits.items():
        if value is not None and value < 1:
            raise InvalidParameter(f"{parameter} must be at least 1")
    login = require_grant(session, name)
    pipeline = _pipeline(session, name, version)
    model = pipeline.version.model
    _require_same_model(session, pipeline, version)
    remote = _opened(session, name, login)
    remote.is_unsure = True
    state = remote.worker.take(version, model, max_rows)
    orders = remote.worker.desk.hand_out(model.config.name, max_tokens, max_requests)
    _settle(session, remote)
    fence = remote.worker.worker_id
    if not orders:
        return [{"state": state, "claim": None, "fence": fence, "texts": None}]
    return [{"state": "batch", "claim": o.number, "fence": fence, "texts": list(o.texts)} for o in orders]


@entry_point
def finish_batch(session: Session, claim: int, fence: int, data: bytes | None, tokens: int | None) -> int:
    """Write the vectors of a claim, after every check that costs less than the write."""
    remote = _held(session, fence)
    order = _order(remote, claim)
    block = _block(remote, order, data, tokens)
    remote.is_unsure = True
    del remote.worker.desk.handed[claim]
    order.future.set_result(block)
    return _write(session, remote)


@entry_point
def fail_batch(
    session: Session, claim: int, fence: int, kind: str, detail: str | None, retry_after: float | None
) -> None:
    """Treat a claim as a request that failed in this way."""
    remote = _held(session, fence)
    order = _order(remote, claim)
    failure = _failure(kind, detail, retry_after)
    remote.is_unsure = True
    del remote.worker.desk.handed[claim]
    order.future.set_exception(failure)
    _write(session, remote)


@entry_point
def release_batches(session: Session) -> None:
    """End this session's remote worker and free its claims, uncharged."""
    if _KEY in session.cache:
        _close(session)
    session.cache.pop(_MODELS, None)


def _pipeline(session: Session, name: str, number: int | None) -> Pipeline:
    """Return the pipeline with one of its versions, the serving one if none is named."""
    return load_pipeline(session, name) if number is None else load_version(session, name, number)


def _require_same_model(session: Session, pipeline: Pipeline, number: int | None) -> None:
    """Raise ModelChanged if the version's model is not the session's.

    A cutover has changed it. Vectors of the former model would be stored as those of the new one.
    """
    models: dict[tuple[str, int | None], int] = session.cache.setdefault(_MODELS, {})
    model_id = pipeline.version.model.model_id
    if models.setdefault((pipeline.name, number), model_id) != model_id:
        raise ModelChanged(
            f'version {pipeline.version.number} of pipeline "{pipeline.name}" has another model than this session embeds with',
            detail="Another version serves since. What is claimed may still be finished.",
            hint=f"SELECT embedline.release_batches(); SELECT embedline.remote_model('{pipeline.name}'); tells the model of now.",
        )


def _opened(session: Session, name: str, login: str) -> _Remote:
    """Return the session's remote worker, begun if there is none."""
    _require_read_committed(session)
    remote: _Remote | None = session.cache.get(_KEY)
    if remote is not None and remote.worker.name != name:
        raise NotReady(
            f'this session embeds pipeline "{remote.worker.name}"',
            hint="SELECT embedline.release_batches(); ends that, or open another session.",
        )
    if remote is not None and _is_lost(session, remote):
        _close(session)
        remote = None
    if remote is None:
        prepare_environment()
        desk = Desk()
        worker_id = lease.next_worker_id(session)
        remote = session.cache[_KEY] = _Remote(RemoteWorker(session, worker_id, name, desk), login)
        session.cache.pop("embedline.embedders", None)
        session.cache[EMBEDDER_FACTORY] = lambda config: RemoteEmbedder(config, desk)
        lease.take(session, worker_id, None, login)
    return remote


def _held(session: Session, fence: int) -> _Remote:
    """Return the session's remote worker, if the fence is its own."""
    _require_read_committed(session)
    remote: _Remote | None = session.cache.get(_KEY)
    if remote is not None and _is_lost(session, remote):
        _close(session)
        remote = None
    if remote is None or remote.worker.worker_id != fence:
        raise NotReady(
            f"this session does not hold the lease {fence}",
            detail="A lease ends with its session, with release_batches, and with a call that was rolled back. Its rows are"
            " free. Behind a pool a call may reach another session.",
            hint="Claim again, over a direct connection: SELECT * FROM embedline.claim_batch(…);",
        )
    return remote


def _order(remote: _Remote, claim: int) -> Order:
    order = remote.worker.desk.handed.get(claim)
    if order is None:
        raise NotReady(
            f"{_name(remote)} has no claim {claim}", hint="Claim again: SELECT * FROM embedline.claim_batch(…);"
        )
    if order.future.cancelled():
        raise NotReady(
            f"claim {claim} was released meanwhile",
            detail="A write of the same batch failed; embedline.status tells why.",
            hint="Claim again: SELECT * FROM embedline.claim_batch(…);",
        )
    return order


def _block(remote: _Remote, order: Order, data: bytes | None, tokens: int | None) -> EmbeddingBlock:
    """Return the answer, if it is one usable vector for each text."""
    from embedline.core import vectors

    dimensions, count = remote.worker.dimensions[order.model], len(order.texts)
    told = f"{_name(remote)}, claim {order.number}"
    if data is None or len(data) != 4 * count * dimensions:
        given = "NULL is" if data is None else f"{len(data)} bytes are"
        raise InvalidVectors(
            f"{told}: {given} not {count} vectors of {dimensions} float32 values",
            hint="SELECT embedline.fail_batch(…); if the model cannot embed the texts.",
        )
    faults = vectors.find_faults(vectors.matrix_from_bytes(data, count, dimensions), "vector")
    if faults:
        place, reason = next(iter(faults.items()))
        raise InvalidVectors(
            f"{told}: {reason}, at text {place + 1} of {count}",
            hint="SELECT embedline.fail_batch(…, 'invalid_vectors'); finds the text by halves.",
        )
    if tokens is not None and tokens < 0:
        raise InvalidParameter(f"{told}: tokens must not be negative")
    return EmbeddingBlock(count, dimensions, data, tokens)


def _failure(kind: str, detail: str | None, retry_after: float | None) -> ProviderError:
    told = detail[:_DETAIL_LENGTH] if detail else None
    if retry_after is not None and not retry_after >= 0:
        # NaN, too: no wait could be stored that is counted from it.
        retry_after = None
    if kind == "rejected" or kind == "too_long":
        rejected = InputRejected(detail=told)
        rejected.is_too_long = kind == "too_long"
        return rejected
    if kind == "misconfigured":
        return ProviderMisconfigured(detail=told)
    if kind == "invalid_vectors":
        return InvalidVectors(told)
    if kind in _CLASSES:
        return TransientProviderError(
            detail=told,
            retry_after=retry_after,
            throttled=kind == "throttled",
            unreachable=kind == "unreachable",
        )
    raise InvalidParameter(f'there is no class of failures "{kind}"', hint=f"One of {', '.join(_CLASSES)}.")


def _write(session: Session, remote: _Remote) -> int:
    worker = remote.worker
    embedded = worker.write_ready()
    if worker.is_report_due:
        worker.report()
    _settle(session, remote)
    return embedded


def _settle(session: Session, remote: _Remote) -> None:
    """Note the transaction in which the worker was changed."""
    remote.transaction = session.scalar("SELECT pg_current_xact_id_if_assigned()::text")
    remote.is_unsure = False


def _is_lost(session: Session, remote: _Remote) -> bool:
    """Return True if the last call was rolled back, so that the memory of it is wrong.

    Raises NotReady if it was a call of this very transaction: its texts may be known outside before it is committed.
    """
    if remote.is_unsure:
        return True
    if remote.transaction is None:
        return False
    status = session.scalar("SELECT pg_xact_status($1::text::xid8)", ["text"], remote.transaction)
    if status == "in progress":
        raise NotReady(
            "calls of a remote worker are transactions of their own",
            hint="Call it outside a transaction block: autocommit.",
        )
    return bool(status == "aborted")


def _close(session: Session) -> None:
    remote: _Remote = session.cache.pop(_KEY)
    session.cache[EMBEDDER_FACTORY] = create_embedder
    session.cache.pop("embedline.embedders", None)
    for order in [*remote.worker.desk.waiting, *remote.worker.desk.handed.values()]:
        order.future.cancel()
    remote.worker.current = None
    try:
        remote.worker.end()
    finally:
        lease.release(session, remote.worker.worker_id)


def _require_read_committed(session: Session) -> None:
    if session.scalar("SELECT current_setting('transaction_isolation')") != "read committed":
        raise NotReady(
            "a remote worker must see what others have committed since",
            hint="SET default_transaction_isolation = 'read committed';",
        )


def _name(remote: _Remote) -> str:
    return f'remote worker {remote.worker.worker_id} of "{remote.login}"'
