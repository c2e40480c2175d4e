"""What a caller asks of a training, checked."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedline.errors import InvalidParameter, NotReady

# What the extra train brings.
LIBRARIES = ("torch", "sentence_transformers", "transformers", "datasets", "accelerate")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
# A static model has no layers that could forget: its table takes steps a thousand times as large.
_STATIC_RATE, _RATE = 2e-2, 2e-5
_STATIC_BATCH, _BATCH = 256, 64


@dataclass(frozen=True)
class Parameters:
    """All that decides a training beside its pairs, its base and its seed."""

    epochs: int
    learning_rate: float
    batch_size: int
    negatives: int
    held_out: float
    corpus: int

    def as_dict(self) -> dict[str, Any]:
        """Return the parameters by name."""
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """The options of `embedline finetune`; None leaves one to the kind of model."""

    pipeline: str
    base: str
    pairs: str
    name: str
    seed: int
    epochs: int
    learning_rate: float | None
    batch_size: int | None
    negatives: int
    held_out: float
    corpus: int
    device: str | None
    output: Path | None
    model_path: str | None
    restart: bool

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise InvalidParameter(
                f"{self.name!r} is no name for a model and its directory",
                hint="Use letters, digits, dots, dashes and underscores; for example --name docs-1.",
            )
        if not 0 < self.held_out < 1:
            raise InvalidParameter(f"--held-out must be between 0 and 1, not {self.held_out:g}", hint="0.2 is a fifth.")
        if self.learning_rate is not None and not 0 < self.learning_rate < 10:
            raise InvalidParameter(
                f"--learning-rate cannot be {self.learning_rate:g}", hint="Leave it out to begin with."
            )

    def parameters(self, *, is_static: bool) -> Parameters:
        """Return the parameters with the defaults of the kind of model."""
        rate = self.learning_rate or (_STATIC_RATE if is_static else _RATE)
        size = self.batch_size or (_STATIC_BATCH if is_static else _BATCH)
        return Parameters(self.epochs, rate, size, self.negatives, self.held_out, self.corpus)


def require_libraries() -> None:
    """Raise NotReady if a library of the extra train is missing."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise NotReady(
            f"fine-tuning needs {', '.join(missing)}",
            hint="pip install 'embedline[train]'; where no GPU is, install a build of torch without CUDA first.",
        )
