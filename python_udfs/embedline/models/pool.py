"""Keep the session's embedders, and wait for them cancellably.

A cancel or a timeout of the server ends the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from embedline.catalog.values import Model
from embedline.core.embedding import Embedder, EmbeddingBlock, Kind, ModelConfig, ModelInfo
from embedline.core.media import Modality, ModelInput
from embedline.embedders import create_embedder
from embedline.errors import InputRejected
from embedline.postgres.session import Session

if TYPE_CHECKING:
    from embedline.chunking import ChunkingSpec


T = TypeVar("T")
# Key of a session's function that makes embedders, if it is not create_embedder.
EMBEDDER_FACTORY = "embedline.embedder_factory"
_POLL_SECONDS = 0.1


class PooledEmbedder:
    """An embedder with its requests in flight, so that a replacement loses none."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._in_flight: set[Future[EmbeddingBlock]] = set()

    def submit(self, texts: Sequence[ModelInput], kind: Kind) -> Future[EmbeddingBlock]:
        future = self._embedder.submit(texts, kind)
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        return future

    def submit_segments(
        self, files: Sequence[bytes], modality: Modality, spec: ChunkingSpec
    ) -> Future[list[list[tuple[int, int]] | str]]:
        """Start finding the segments of files; only local models do."""
        from embedline.embedders.local import LocalEmbedder

        if not isinstance(self._embedder, LocalEmbedder):
            raise InputRejected("this provider finds no segments")
        return self._embedder.submit_segments(files, modality, spec)

    def probe(self) -> Future[ModelInfo]:
        return self._embedder.probe()

    def close(self) -> None:
        self._embedder.close()

    @property
    def is_idle(self) -> bool:
        """Return True if no request is in flight."""
        return not self._in_flight


def embedder_for(session: Session, model: Model) -> PooledEmbedder:
    """Return the session's embedder of a model, made on first use and kept."""
    pool: dict[tuple[int, ModelConfigKey], PooledEmbedder] = session.cache.setdefault("embedline.embedders", {})
    # Replaced embedders with requests in flight. The answers to these are paid for, and are still written.
    replaced: list[PooledEmbedder] = session.cache.setdefault("embedline.replaced_embedders", [])
    key = (model.model_id, _config_key(model.config))
    if key not in pool:
        replaced += [pool.pop(stale) for stale in [other for other in pool if other[0] == model.model_id]]
        pool[key] = PooledEmbedder(session.cache.get(EMBEDDER_FACTORY, create_embedder)(model.config))
    for embedder in [embedder for embedder in replaced if embedder.is_idle]:
        replaced.remove(embedder)
        embedder.close()
    return pool[key]


def renew_embedders(session: Session, model_id: int) -> None:
    """Forget the pauses that answers to this session asked for."""
    pool: dict[tuple[int, ModelConfigKey], PooledEmbedder] = session.cache.get("embedline.embedders", {})
    replaced: list[PooledEmbedder] = session.cache.setdefault("embedline.replaced_embedders", [])
    replaced += [pool.pop(key) for key in [key for key in pool if key[0] == model_id]]


ModelConfigKey = str


def _config_key(config: ModelConfig) -> ModelConfigKey:
    # An embedder itself remembers the facts that its own answers have shown.
    return repr(replace(config, learned={}))


def let_cancel_through(session: Session) -> Callable[[], None]:
    """Return a function to call about every 0.1 s while waiting in a transaction.

    Only plpy.execute heeds a cancel.
    """

    def breathe() -> None:
        session.plpy.execute("SELECT 1")

    return breathe


def wait_first(
    futures: Collection[Future[T]], on_wait: Callable[[], None], is_over: Callable[[], bool] = lambda: False
) -> set[Future[T]]:
    """Return the futures that are done as soon as one is.

    Returns none once `is_over`. Calls `on_wait` about every 0.1 s.
    """
    while True:
        done, _ = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        if done or is_over():
            return done
        on_wait()


def wait_result(future: Future[T], on_wait: Callable[[], None]) -> T:
    """Return the future's result, calling `on_wait` about every 0.1 s.

    The future's error is raised.
    """
    wait_first([future], on_wait)
    return future.result()
