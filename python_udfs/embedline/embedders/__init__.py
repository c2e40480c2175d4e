"""Embedding providers, one module each behind the `Embedder` protocol.

docs/how-to/openai-endpoints.md tells how to add one.
"""

from embedline.core.embedding import Embedder, EmbeddingBlock, Kind, ModelConfig, ModelInfo
from embedline.core.processes import signals_blocked, start_thread
from embedline.embedders.registry import (
    ENTRY_POINT_GROUP,
    RERANK_PROVIDERS,
    check_task,
    create_embedder,
    create_reranker,
    known_options,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "RERANK_PROVIDERS",
    "Embedder",
    "EmbeddingBlock",
    "Kind",
    "ModelConfig",
    "ModelInfo",
    "check_task",
    "create_embedder",
    "create_reranker",
    "known_options",
    "signals_blocked",
    "start_thread",
]
