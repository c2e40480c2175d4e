"""Run a transformer with pooling on token ids, in batches of like length.

The modules are the model's own, so the vectors are those of `SentenceTransformer.encode`. What is replaced is the way
from texts to padded batches. A model for which the ids would differ keeps `encode`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from embedline.model_host.tokens import FlatTokenizer, Tokens, padded_batches

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

log = logging.getLogger("embedline.model_host")

# Modules after the transformer and the pooling that read nothing but the pooled vector.
_AFTER_POOLING = ("Dense", "Normalize")
# What the forward of such a model reads; other tensors would be needed for a model that does more.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Least tokens of a padded batch. Cutting smaller ones saves less padding than another pass costs.
_LEAST_CPU_TOKENS, _LEAST_CUDA_TOKENS = 256, 16_384
# Texts for which the ids must be those of the library: spaces, cases, scripts, a text that is cut, none at all.
_SAMPLES = (
    "The quick brown fox",
    "  Leading and trailing   spaces \n",
    "CamelCase, ÀÉÎ, straße, ﬁ, \u0130stanbul, e\u0301",
    "数据库 базы данных قاعدة 🐘 👩\u200d💻",
    "tab\tnul-like \u200b\ufeff soft\u00adhyphen",
    "",
    " ",
    "write-ahead logging " * 2000,
)


class FlatModel(Protocol):
    """A model that takes token ids."""

    # Slices that it can have begun at once.
    in_flight: int

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of texts; called from several threads."""

    def start(self, tokens: Tokens) -> Callable[[], NDArray[np.float32]]:
        """Begin a pass.

        The returned function waits for its rows, in the order of the tokens.
        """


class FlatTransformer:
    """A SentenceTransformer that takes token ids."""

    def __init__(self, model: SentenceTransformer, tokenizer: FlatTokenizer, has_types: bool) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._has_types = has_types
        self._pad = int(model.tokenizer.pad_token_id)
        on_cuda = model.device.type == "cuda"
        self._least_tokens = _LEAST_CUDA_TOKENS if on_cuda else _LEAST_CPU_TOKENS
        self._transfer: _Transfer = _CudaTransfer(model.device) if on_cuda else _Transfer(model.device)
        # While the device computes one slice, the next one is copied and waits. So it never waits for Python.
        self.in_flight = 2 if on_cuda else 1

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of texts."""
        return self._tokenizer.tokenize(texts)

    def start(self, tokens: Tokens) -> Callable[[], NDArray[np.float32]]:
        """Begin a pass.

        The returned function waits for its float32 rows, in the order of the tokens.
        """
        import numpy as np
        import torch

        order = np.argsort(-tokens.lengths, kind="stable")
        lengths = tokens.lengths[order]
        with torch.inference_mode():
            ids, starts, sizes, places = self._transfer.to_device(
                tokens.ids, tokens.starts[order], lengths.astype(np.int64), order
            )
            rows = [
                self._forward(ids, starts[first:last], sizes[first:last], max(1, int(lengths[first])))
                for first, last in padded_batches(lengths, self._least_tokens)
            ]
            sorted_rows = torch.cat(rows) if len(rows) > 1 else rows[0]
            found = torch.empty_like(sorted_rows)
            found[places] = sorted_rows
            return self._transfer.to_host(found)

    def _forward(self, ids: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """Pad texts to `width` on the device and return their vectors in float32."""
        import torch

        columns = torch.arange(width, device=ids.device)
        mask = columns < lengths[:, None]
        # Places behind a text's end belong to the next text, or to none.
        chosen = ids[(starts[:, None] + columns).clamp_(max=max(len(ids) - 1, 0))].long()
        features = {
            "input_ids": chosen.masked_fill_(~mask, self._pad),
            "attention_mask": mask.long(),
        }
        if self._has_types:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        vectors: torch.Tensor = self._model(features)["sentence_embedding"]
        return vectors.float()


class _Transfer:
    """Copy arrays to a device and rows from it, each before the call returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def to_device(self, *arrays: NDArray[Any]) -> list[torch.Tensor]:
        import torch

        return [torch.from_numpy(array).to(self._device) for array in arrays]

    def to_host(self, rows: torch.Tensor) -> Callable[[], NDArray[np.float32]]:
        found: NDArray[np.float32] = rows.cpu().numpy()
        return lambda: found


class _CudaTransfer(_Transfer):
    """Arrays to and from a CUDA device, on streams of their own.

    The memory on this side is pinned, so the copies run beside the passes of other slices.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        super().__init__(device)
        self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_device(self, *arrays: NDArray[Any]) -> list[torch.Tensor]:
        import torch

        passes = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._inward):
            copies = [torch.from_numpy(a).pin_memory().to(self._device, non_blocking=True) for a in arrays]
        passes.wait_stream(self._inward)
        for copy in copies:
            # Its memory may be used again only when the passes are done, not when its own stream is.
            copy.record_stream(passes)
        return copies

    def to_host(self, rows: torch.Tensor) -> Callable[[], NDArray[np.float32]]:
        import torch

        found = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            found.copy_(rows, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._outward)
        rows.record_stream(self._outward)

        def wait() -> NDArray[np.float32]:
            # Gives up the interpreter's lock.
            done.synchronize()
            array: NDArray[np.float32] = found.numpy()
            return array

        return wait


def flat_transformer(model: SentenceTransformer) -> FlatTransformer | None:
    """Return the model with token ids as its input, None if it cannot have them.

    It can have them if they are those of the library for all samples."""
    try:
        reason = _unlike(model) or ""
        found = None if reason else _with_same_ids(model)
    except Exception as error:
        # Other releases of the library may lack what is read here. The model itself has loaded.
        reason, found = repr(error), None
    if found is None:
        log.info("texts go through SentenceTransformer.encode: %s", reason or "its token ids are others")
    return found


def _unlike(model: SentenceTransformer) -> str | None:
    """Return how a model differs from a transformer with pooling, None if it does not."""
    from tokenizers import Tokenizer

    kinds = [type(module).__name__ for module in model]
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind not in _AFTER_POOLING for kind in kinds[2:]):
        return f"its modules are {', '.join(kinds)}"
    if set(getattr(model, "modalities", ["text"])) != {"text"}:
        return "it takes more than texts"
    if getattr(model, "truncate_dim", None) is not None:
        return "its vectors are cut"
    own = model.tokenizer
    if not isinstance(getattr(own, "backend_tokenizer", None), Tokenizer) or own.pad_token_id is None:
        return "its tokenizer is not of the tokenizers library"
    if (own.padding_side, own.truncation_side) != ("right", "right"):
        return "its texts are padded or cut at their beginning"
    return None


def _with_same_ids(model: SentenceTransformer) -> FlatTransformer | None:
    """Return the model if our token ids are the library's, else None."""
    from tokenizers import Tokenizer

    own, longest = model.tokenizer, model.max_seq_length
    limit = None if longest is None or math.isinf(longest) or longest > 10**9 else int(longest)
    flat = FlatTokenizer(Tokenizer.from_str(own.backend_tokenizer.to_str()), limit)
    samples = [*_SAMPLES, " ".join(["the", *map(str, own.all_special_tokens), "end"])]
    # Its name before sentence-transformers 5.4 was tokenize.
    features: dict[str, Any] = getattr(model, "preprocess", model.tokenize)(samples)
    tensors = {name: value for name, value in features.items() if hasattr(value, "shape")}
    if not {"input_ids", "attention_mask"} <= tensors.keys() <= set(_INPUTS):
        return None
    mask = tensors["attention_mask"].bool()
    types = tensors.get("token_type_ids")
    if types is not None and bool(types.any()):
        return None
    ours = flat.tokenize(samples)
    theirs = tensors["input_ids"]
    if mask.sum(1).tolist() != ours.lengths.tolist() or theirs[mask].tolist() != ours.ids.tolist():
        return None
    return FlatTransformer(model, flat, types is not None)
