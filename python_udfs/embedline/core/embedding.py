"""Define a provider's input, its output, and its protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from embedline.core.endpoints import LOOPBACK
from embedline.core.media import ModelInput

if TYPE_CHECKING:
    pass


Kind = Literal["document", "query"]
# Work of a model: vectors of texts, or scores of pairs of a query and a text.
Task = Literal["embed", "rerank"]
TASKS: tuple[Task, ...] = ("embed", "rerank")


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a registered model that its provider needs.

    They are a row of embedline.model.
    """

    name: str
    provider: str
    model: str
    dimensions: int | None = None
    revision: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    document_prefix: str = ""
    query_prefix: str = ""
    max_batch_items: int = 2048
    max_batch_tokens: int = 300_000
    concurrency: int = 8
    timeout_seconds: float = 60.0
    options: Mapping[str, Any] = field(default_factory=dict)
    task: Task = "embed"
    # Deviations from OpenAI's interface that earlier answers of the endpoint have shown; see EmbeddingBlock.learned.
    learned: Mapping[str, str] = field(default_factory=dict)
    # Addresses that may be asked, as scheme://host:port; rows of embedline.allowed_endpoint. See core/endpoints.py.
    allowed_endpoints: Sequence[str] = LOOPBACK


@dataclass(frozen=True)
class EmbeddingBlock:
    """The vectors that a provider returned for one request.

    `data` holds `count` vectors of `dimensions` float32 values, little-endian, row after row. `tokens` is the number
    that the provider charges, None if it names none. `learned` is kept with the model: how this endpoint differs from
    OpenAI's.
    """

    count: int
    dimensions: int
    data: bytes
    tokens: int | None = None
    learned: Mapping[str, str] = field(default_factory=dict, hash=False)
    # Why inputs have no vector, by their places: files that cannot be decoded. Their rows hold NaN.
    faults: Mapping[int, str] = field(default_factory=dict, hash=False)
    # That of the model that answered, if it has several towers.
    fingerprint: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """The facts that probing a model tells.

    `dimensions` is 0 for a reranker, which returns scores. `max_tokens` is the longest text in the model's own tokens,
    special tokens already taken off; None if unknown. `tokenizer_path` is a Hugging Face tokenizer.json that the server
    can read; None if the tokens are not known offline. `modalities` are the kinds of contents that it makes vectors of.
    """

    dimensions: int
    max_tokens: int | None
    tokenizer_path: str | None
    fingerprint: str
    modalities: tuple[str, ...] = ("text",)
    learned: Mapping[str, str] = field(default_factory=dict, hash=False)


class Embedder(Protocol):
    """A provider, bound to one model.

    Its threads run with all signals blocked and never touch the database.
    """

    def submit(self, texts: Sequence[ModelInput], kind: Kind) -> Future[EmbeddingBlock]:
        """Start embedding texts or segments of media.

        Texts get the prefix of their kind.

        The future raises ProviderError (or a subclass). At most `ModelConfig.concurrency` requests are in flight.
        """

    def probe(self) -> Future[ModelInfo]:
        """Ask the model once for its dimensions and limits."""

    def close(self) -> None:
        """Release connections and threads."""
