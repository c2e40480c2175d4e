"""Score texts for a query with a reranker, within its budget.

Remote models are asked through the connections that all sessions share, local ones through their host.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from embedline.catalog.load import load_reranker
from embedline.catalog.values import Model
from embedline.core.embedding import ModelConfig, ModelInfo
from embedline.core.request_tokens import likely_tokens, plausible_tokens
from embedline.core.reranking import Reranker, RerankScores
from embedline.core.text import repair_text
from embedline.embedders import create_reranker
from embedline.errors import (
    InvalidParameter,
    InvalidScores,
    ModelHostUnavailable,
    NotReady,
    ProviderError,
    TransientProviderError,
    UnusableText,
)
from embedline.models.pool import let_cancel_through, wait_result
from embedline.models.query_embedding import do_without_host, shared_host
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session
from embedline.postgres.spans import Attributes, record

_MAX_TEXTS = 10_000
# A text that answers the query, and one that does not.
_PROBE_QUERY = "Where do polar bears live?"
_PROBE_TEXTS = ("Polar bears live in the Arctic, on the sea ice.", "The bakery in our street opens at eight.")
# Cohere charges one search unit for a query and up to 100 texts. A text of more than 500 tokens counts in pieces.
_TEXTS_PER_UNIT, _TOKENS_PER_PIECE = 100, 500
_RERANKERS = "embedline.rerankers"
_RESERVE = "SELECT * FROM embedline._reserve_rerank($1, $2, $3)"
_SETTLE = "SELECT embedline._settle_rerank($1, $2)"


@entry_point
def rerank(session: Session, model: str, query: str, texts: Sequence[str] | None) -> list[float]:
    """Return one score for each text; a higher one is a better answer to the query."""
    require_given(model=model, query=query, texts=texts)
    return Reranking(session, model, query, texts or ()).result()


class Reranking:
    """Texts in flight to a reranker.

    The caller may do other work before it asks for the `result`. `pipeline_id` names the pipeline whose budget pays, too.
    """

    def __init__(
        self, session: Session, model_name: str, query: str, texts: Sequence[str | None], pipeline_id: int | None = None
    ) -> None:
        """Reserve the call and start it.

        Raises NotFound or InvalidParameter for the model or the texts, and UnusableText for a text without words. Raises
        NotReady if a budget is used up, and TransientProviderError if a rate limit does not allow the call now.
        """
        self._session = session
        self._model = load_reranker(session, model_name)
        self._query, self._texts = repair_text(query), _usable(texts)
        self._started_at = time.monotonic()
        self._reservation_id: int | None = None
        self._future: Future[RerankScores] | None = None
        if self._texts:
            self._reservation_id = self._reserve(pipeline_id)
            shared = self._shared()
            self._is_shared = shared is not None
            try:
                self._future = shared or self._own()
            except ProviderError:
                self._settle(0)
                raise

    def result(self) -> list[float]:
        """Return the scores in the order of the texts; the statement stays cancellable.

        Raises ProviderError.
        """
        if self._future is None:
            return []
        try:
            block = self._result(self._future)
            scores = block.values()
            if len(scores) != len(self._texts):
                raise InvalidScores(f"the reranker returned {len(scores)} scores for {len(self._texts)} texts")
        except ProviderError as error:
            # A refusal was not paid for. Other failures may have been, so the estimate stays.
            self._settle(0 if error.is_refusal else None)
            self._tell(None, type(error).__name__)
            raise
        self._settle(self._charged(block))
        self._tell(block.units, None)
        return scores

    def cancel(self) -> None:
        """End the request if it has not ended, because its answer is not needed."""
        if self._future is not None:
            self._future.cancel()

    def _result(self, future: Future[RerankScores]) -> RerankScores:
        try:
            return self._wait(future)
        except ModelHostUnavailable:
            if not self._is_shared:
                raise
            do_without_host(self._session)
            self._future = self._own()
            return self._wait(self._future)

    def _wait(self, future: Future[RerankScores]) -> RerankScores:
        try:
            return wait_result(future, let_cancel_through(self._session))
        except BaseException:
            # Such as a cancel or a timeout of the statement.
            future.cancel()
            raise

    def _shared(self) -> Future[RerankScores] | None:
        config = self._model.config
        host = shared_host(self._session, config.provider)
        try:
            return None if host is None else host.submit_shared_rerank(config, self._query, self._texts)
        except (ProviderError, OSError):
            do_without_host(self._session)
            return None

    def _own(self) -> Future[RerankScores]:
        return reranker_for(self._session, self._model).submit_rerank(self._query, self._texts)

    # Money

    def _reserve(self, pipeline_id: int | None) -> int | None:
        name = self._model.config.name
        rows = self._session.query(_RESERVE, ["text", "bigint", "bigint"], name, pipeline_id, self._estimate())
        reservation_id, wait, reason = (rows[0][column] for column in ("reservation_id", "wait_seconds", "reason"))
        if reason is None:
            return None if reservation_id is None else int(reservation_id)
        message = f'reranker "{name}" may not be asked now: {reason}'
        if reason.startswith("rate limit"):
            raise TransientProviderError(message, retry_after=wait, throttled=True)
        raise NotReady(
            message, hint="SELECT * FROM embedline.budget; shows the budgets; embedline.set_budget raises one."
        )

    def _estimate(self) -> int:
        """Return the likely charge of the call, on the safe side.

        It is in tokens, or in Cohere's search units.
        """
        of_query = likely_tokens(self._query)
        tokens = [of_query + likely_tokens(text) for text in self._texts]
        if self._model.config.provider != "cohere":
            return sum(tokens)
        pieces = sum(-(-count // _TOKENS_PER_PIECE) for count in tokens)
        return -(-pieces // _TEXTS_PER_UNIT)

    def _charged(self, block: RerankScores) -> int | None:
        """Return the provider's count, None if it gave none that can be believed."""
        if self._model.config.provider == "cohere":
            return block.units
        config = self._model.config
        prefix = config.query_prefix + self._query + config.document_prefix
        return plausible_tokens(block.units, self._texts, prefix)

    def _settle(self, amount: int | None) -> None:
        if self._reservation_id is not None:
            self._session.query(_SETTLE, ["bigint", "bigint"], self._reservation_id, amount)
            self._reservation_id = None

    def _tell(self, tokens: int | None, error: str | None) -> None:
        """Tell exporters of the request."""

        def attributes() -> Attributes:
            config = self._model.config
            return {
                "model": config.model,
                "provider": config.provider,
                "address": config.base_url,
                "texts": len(self._texts),
                "tokens": tokens,
                "error": error,
            }

        record("rerank", time.monotonic() - self._started_at, attributes)


def reranker_for(session: Session, model: Model) -> Reranker:
    """Return the session's client of a reranker, made on first use and kept."""
    pool: dict[int, tuple[str, Reranker]] = session.cache.setdefault(_RERANKERS, {})
    key = repr(replace(model.config, learned={}))
    known = pool.get(model.model_id)
    if known is None or known[0] != key:
        if known is not None:
            known[1].close()
        pool[model.model_id] = known = key, create_reranker(model.config)
    return known[1]


def probe_reranker(session: Session, config: ModelConfig) -> ModelInfo:
    """Score two texts, and return the model's limits; the statement can be cancelled.

    Warns if the text that answers the query is not the better one.
    """
    reranker = create_reranker(config)
    try:
        breathe = let_cancel_through(session)
        info = wait_result(reranker.probe(), breathe)
        right, wrong = wait_result(reranker.submit_rerank(_PROBE_QUERY, _PROBE_TEXTS), breathe).values()
    finally:
        reranker.close()
    if right <= wrong:
        session.plpy.warning(
            f'model "{config.name}" scores a text that answers a query no higher than one that does not',
            detail=f'For "{_PROBE_QUERY}" it gave {right:g} to "{_PROBE_TEXTS[0]}" and {wrong:g} to "{_PROBE_TEXTS[1]}".',
            hint="Is it a reranker, and for English?",
        )
    return info


def _usable(texts: Sequence[str | None]) -> list[str]:
    """Return the repaired texts.

    Raises InvalidParameter, or UnusableText with the text's number.
    """
    if len(texts) > _MAX_TEXTS:
        raise InvalidParameter(f"{len(texts)} texts are more than {_MAX_TEXTS}", hint="Rerank the best of them only.")
    usable = []
    for number, text in enumerate(texts, 1):
        if text is None:
            raise InvalidParameter(f"text {number} of {len(texts)} is NULL", hint="Leave it out.")
        try:
            usable.append(repair_text(text))
        except UnusableText as error:
            raise UnusableText(
                f"text {number} of {len(texts)} has nothing in it to score", detail=error.detail
            ) from None
    return usable
