"""The desk at which requests wait for a remote worker."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from embedline.core.embedding import EmbeddingBlock, Kind, ModelConfig, ModelInfo
from embedline.core.request_tokens import likely_tokens
from embedline.errors import ProviderMisconfigured


@dataclass(frozen=True)
class Order:
    """Texts that a remote worker is to embed in one request."""

    number: int
    model: str
    texts: Sequence[str]
    future: Future[EmbeddingBlock]


@dataclass
class Desk:
    """The orders of one session: those that wait, and those that a remote worker has."""

    is_closed: bool = False
    waiting: list[Order] = field(default_factory=list)
    handed: dict[int, Order] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def place(self, model: str, texts: Sequence[str]) -> Future[EmbeddingBlock]:
        """Leave an order, and return the future of its answer."""
        if self.is_closed:
            # A wait for the answer would hold up the call that hands out the order.
            raise ProviderMisconfigured("a remote worker cannot be asked while the server chunks a document")
        order = Order(next(self._numbers), model, list(texts), Future())
        self.waiting.append(order)
        return order.future

    def waiting_for(self, model: str) -> list[Order]:
        """Return the orders of a model that wait."""
        return [order for order in self.waiting if order.model == model and not order.future.cancelled()]

    def hand_out(self, model: str, max_tokens: int | None, max_requests: int | None) -> list[Order]:
        """Return so many waiting orders of a model at most, of about so many tokens.

        Return at least one if one waits.
        """
        chosen, tokens = list[Order](), 0
        for order in self.waiting_for(model):
            if len(chosen) == max_requests or (chosen and max_tokens is not None and tokens >= max_tokens):
                break
            tokens += sum(map(likely_tokens, order.texts))
            chosen.append(order)
        self.handed |= {order.number: order for order in chosen}
        self.waiting = [o for o in self.waiting if o.number not in self.handed and not o.future.cancelled()]
        return chosen


class RemoteEmbedder:
    """An embedder whose requests are answered by calls of finish_batch and fail_batch."""

    def __init__(self, config: ModelConfig, desk: Desk) -> None:
        self._config = config
        self._desk = desk

    def submit(self, texts: Sequence[str], kind: Kind) -> Future[EmbeddingBlock]:
        """Leave the texts at the desk; the remote worker adds the prefix."""
        return self._desk.place(self._config.name, texts)

    def probe(self) -> Future[ModelInfo]:
        """Refuse: a model is registered before a remote worker embeds with it."""
        raise ProviderMisconfigured("a remote worker does not probe models")

    def close(self) -> None:
        """Do nothing."""
