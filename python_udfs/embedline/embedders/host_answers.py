"""Read the answers of the model host as values."""

from __future__ import annotations

import json
from collections.abc import Callable

from embedline.core.embedding import EmbeddingBlock, ModelInfo
from embedline.core.reranking import RerankScores
from embedline.errors import DimensionMismatch, InvalidScores, InvalidVectors
from embedline.model_host.protocol import Frame


def block_reader(count: int, wanted: int | None) -> Callable[[Frame], EmbeddingBlock]:
    """Return the reader of an answer with one vector for each of `count` inputs.

    The vectors have `wanted` dimensions, if the model declares them.
    """

    def read(frame: Frame) -> EmbeddingBlock:
        got, dimensions = int(frame.header["count"]), int(frame.header["dimensions"])
        if got != count or len(frame.payload) != 4 * count * dimensions:
            raise InvalidVectors("the model host did not return one vector for each text")
        if wanted is not None and dimensions != wanted:
            raise DimensionMismatch(detail=f"Expected {wanted} dimensions, got {dimensions}.")
        faults = {int(place): str(reason) for place, reason in frame.header.get("faults", {}).items()}
        fingerprint = frame.header.get("fingerprint")
        return EmbeddingBlock(count, dimensions, frame.payload, faults=faults, fingerprint=fingerprint)

    return read


def scores_reader(count: int) -> Callable[[Frame], RerankScores]:
    """Return the reader of an answer with one score for each of `count` texts."""

    def read(frame: Frame) -> RerankScores:
        got, width = int(frame.header["count"]), int(frame.header["dimensions"])
        if (got, width) != (count, 1) or len(frame.payload) != 4 * count:
            raise InvalidScores("the model host did not return one score for each text")
        return RerankScores(count, frame.payload, frame.header.get("units"))

    return read


def read_info(frame: Frame) -> ModelInfo:
    """Return what a probe tells of a model."""
    names = ("dimensions", "max_tokens", "tokenizer_path", "fingerprint")
    return ModelInfo(**{name: frame.header[name] for name in names}, modalities=tuple(frame.header["modalities"]))


def read_segments(frame: Frame) -> list[list[tuple[int, int]] | str]:
    """Return the segments of each file, or the reason why it cannot be decoded."""
    found = json.loads(frame.payload)
    return [given if isinstance(given, str) else [(int(start), int(end)) for start, end in given] for given in found]
