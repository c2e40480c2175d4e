"""One batch of a provider that a worker deals with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from embedline.catalog.values import Pipeline
from embedline.core.embedding import ModelConfig
from embedline.providers.batches import BatchAnswer, BatchFiles, BatchState
from embedline.queue.open_batches import OpenBatch

if TYPE_CHECKING:
    from embedline.providers.batch_endpoint import BatchEndpoint

# A provider's count of a text's tokens is believed up to this many times the estimate.
_PLAUSIBLE = 8
# Digits of the largest number of a text.
_NUMBER_LENGTH = 19


def endpoint_config(batch: OpenBatch, current: ModelConfig | None, allowed: Sequence[str]) -> ModelConfig:
    """Return the model by which a batch's endpoint is asked.

    `current` is how it is registered now, None if it is gone.
    """
    config = {**batch.config, "allowed_endpoints": allowed}
    # At the same address, with the key of now.
    if current is not None and current.base_url == config["base_url"]:
        config["api_key_env"], config["options"] = current.api_key_env, dict(current.options)
    # A batch may be older than the code.
    known = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in config.items() if name in known})


@dataclass
class BatchJob:
    """A batch, the question to the provider about it, and its answers."""

    batch: OpenBatch
    endpoint: BatchEndpoint
    future: Future[Any] | None = None
    # The batch's state at its end, its files, and the lines that are not read yet.
    ended: BatchState | None = None
    files: BatchFiles | None = None
    lines: Iterator[bytes] | None = None
    tokens_used: int = 0
    is_cancelled: bool = False
    # It is only searched for: batches are not wanted any more.
    is_withdrawn: bool = False
    # Tokens that were reserved for each text, by its number, and the numbers of the texts whose answers were read.
    estimates: dict[int, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    @property
    def is_ready(self) -> bool:
        """Return True if there is something to do for it now."""
        return self.lines is not None or (self.future is not None and self.future.done())

    def close(self) -> None:
        """Remove the files of its answers."""
        if self.files is not None:
            self.files.close()

    def is_first(self, answer: BatchAnswer) -> bool:
        """Return True for the first answer to a text of the batch."""
        # A longer number is none of ours, and the longest cannot be read at all.
        is_number = answer.custom_id.isdecimal() and len(answer.custom_id) <= _NUMBER_LENGTH
        number = int(answer.custom_id) if is_number else -1
        if number not in self.estimates or number in self.seen:
            return False
        self.seen.add(number)
        return True

    def tokens(self, answer: BatchAnswer) -> int:
        """Return the tokens that an answer cost."""
        if answer.block is None:
            return 0
        estimate, counted = self.estimates[int(answer.custom_id)], answer.block.tokens
        return counted if counted is not None and counted <= _PLAUSIBLE * estimate else estimate

    def usable(self, pipeline: Pipeline, answers: Sequence[BatchAnswer]) -> list[tuple[int, bytes | None, str | None]]:
        """Return each text's number with its vector, or with the reason for none.

        The vectors are normalised as those of the version.
        """
        from embedline.core import vectors

        version = pipeline.version
        normalise = version.distance != "l2"
        found: list[tuple[int, bytes | None, str | None]] = []
        numbers, rows = list[int](), list[bytes]()
        for answer in answers:
            number, block = int(answer.custom_id), answer.block
            if block is None:
                found.append((number, None, answer.detail))
            elif block.dimensions != version.dimensions:
                told = f"the model returned {block.dimensions} dimensions, the column has {version.dimensions}"
                found.append((number, None, told))
            else:
                numbers.append(number)
                rows.append(block.data)
        if rows:
            matrix = vectors.matrix_from_bytes(b"".join(rows), len(rows), version.dimensions)
            column_type = "vector" if normalise else version.column_type
            usable, faults = vectors.usable_vectors(matrix, column_type, normalise)
            for place, number in enumerate(numbers):
                reason = faults.get(place)
                found.append((number, None if reason else usable[place].astype("<f4").tobytes(), reason))
        return found
