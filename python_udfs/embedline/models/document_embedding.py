"""Embed texts again, and tell whether their vectors are those of the same model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedline.catalog.values import Pipeline
from embedline.core import vectors
from embedline.core.embedding import Embedder, ModelConfig
from embedline.core.media import ModelInput
from embedline.core.vectors import FloatMatrix
from embedline.errors import InvalidVectors
from embedline.models.pool import let_cancel_through, wait_result
from embedline.postgres.session import Session

# Cosine below which a stored vector is not the model's. Noise stays far above: 5e-8 off 1 with MiniLM in other batches
# and in float16 columns; remote models round a little more. Another model is far below: unrelated vectors of 384
# dimensions are within 0.2 of zero.
_MIN_COSINE = 0.99
# Dynamic int8 quantises activations by the range of their batch: up to 0.017 off 1 in other batches (MiniLM, 220
# texts).
_MIN_COSINE_INT8 = 0.95
# Texts of one request. With chunks of the longest context it stays below the provider's limit of tokens.
_REQUEST_TEXTS = 16


def lowest_cosine(config: ModelConfig) -> float:
    """Return the cosine below which two vectors of one text are of different models."""
    return _MIN_COSINE_INT8 if config.options.get("precision") == "int8" else _MIN_COSINE


def embed_texts(session: Session, pipeline: Pipeline, embedder: Embedder, texts: Sequence[ModelInput]) -> FloatMatrix:
    """Return one finite vector with a direction for each text.

    Raises ProviderError otherwise.
    """
    version, breathe = pipeline.version, let_cancel_through(session)
    size = min(version.model.config.max_batch_items, _REQUEST_TEXTS)
    parts = []
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        block = wait_result(embedder.submit(part, "document"), breathe)
        matrix = vectors.matrix_from_bytes(block.data, block.count, block.dimensions)
        vectors.check_shape(matrix, len(part), version.dimensions)
        faults = vectors.find_faults(matrix, version.column_type if version.distance == "l2" else "vector")
        if faults:
            raise InvalidVectors(next(iter(faults.values())))
        parts.append(matrix)
    return np.concatenate(parts)
