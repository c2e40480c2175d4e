"""A model that computes nothing: its tokenizer is real, its vectors are looked up. It leaves the time of all else.

`load` makes it for a host, `bare_model` for SentenceTransformer.encode. Both look vectors up in the same way.
"""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from embedline.model_host.host_settings import HostSettings
    from embedline.model_host.inference import LoadedModel

DIMENSIONS, _ROWS = 384, 4096


@functools.cache
def table() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the vectors, of shape (4096, 384); no two are equal, and none is normalised."""
    return np.random.default_rng(4).standard_normal((_ROWS, DIMENSIONS), dtype=np.float32)


def row_of(ids: list[int]) -> int:
    """Return the place of a text's vector, by the sum of its token ids."""
    return sum(ids) % _ROWS


def _look_up(vectors: torch.Tensor, features: dict[str, Any]) -> torch.Tensor:
    return vectors[(features["input_ids"] * features["attention_mask"]).sum(1) % _ROWS]


def load(settings: HostSettings) -> LoadedModel:
    """Return the model for a host; everything but the pass through the transformer is what the host does otherwise."""
    import torch
    from sentence_transformers.base.modules import Normalize
    from tokenizers import Tokenizer

    from embedline.model_host.flat_transformer import FlatTransformer
    from embedline.model_host.inference import LoadedModel
    from embedline.model_host.tokens import FlatTokenizer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    vectors, normalize = torch.from_numpy(table()), Normalize()

    class Model:
        device = torch.device("cpu")
        tokenizer = SimpleNamespace(pad_token_id=0)

        def eval(self) -> Model:
            return self

        def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = normalize({"sentence_embedding": _look_up(vectors, features)})
            return found

    class Unused:
        # Slices as large as those of an accelerator.
        slice_characters = 262_144
        modalities = ("text",)
        max_tokens = 254

        def free_memory(self) -> None:
            """Nothing is kept."""

        def tokenizer(self) -> None:
            """No text is cut here."""

    tokenizer = FlatTokenizer(Tokenizer.from_file(os.path.join(settings.model, "tokenizer.json")), 256)
    model: Any = Model()
    backend: Any = Unused()
    flat = FlatTransformer(model, tokenizer, has_types=True)
    # As on an accelerator.
    flat.in_flight = 2
    return LoadedModel(settings, backend, flat)


def bare_model(directory: str) -> SentenceTransformer:
    """Return a SentenceTransformer whose pass looks vectors up, too."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    whole = SentenceTransformer(directory, device="cpu", model_kwargs={"dtype": "float32"})
    transformer, vectors = whole[0], torch.from_numpy(table())

    def forward(features: dict[str, Any], **_: object) -> dict[str, Any]:
        return features | {"sentence_embedding": _look_up(vectors, features)}

    transformer.forward = forward
    return SentenceTransformer(modules=[transformer, Normalize()], device="cpu")
