"""Run cross-encoders in onnxruntime or torch.

A cross-encoder scores a query and a text together. Both libraries give the model's own logits, without the sigmoid that
some add, so a model has the same scores in both.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from embedline.core.reranking import Pair
from embedline.errors import ProviderMisconfigured
from embedline.model_host import hub
from embedline.model_host.choice import RERANK_GRAPHS, rerank_graph
from embedline.model_host.onnx_backend import FIELDS, open_session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer

    from embedline.model_host.host_settings import HostSettings

# Characters at which the search for the best slice begins.
_CPU_CHARACTERS, _ACCELERATOR_CHARACTERS = 4096, 262_144
# Longest pair in tokens if no file of the model tells: that of BERT and its kin.
_DEFAULT_TOKENS = 512
# Ends of the names of architectures that give scores.
_SCORING = ("ForSequenceClassification", "ForCausalLM")
# A tokenizer without a limit names a number of 30 digits.
_NO_LIMIT = 1_000_000


class OnnxReranker:
    """A cross-encoder's graph in onnxruntime."""

    modalities = ("text",)

    def __init__(self, directory: str, device: str | None) -> None:
        from tokenizers import Tokenizer

        graph = rerank_graph(directory)
        if graph is None:
            raise ProviderMisconfigured(
                f'"{directory}" holds no cross-encoder for onnxruntime',
                detail=f"It needs tokenizer.json and {' or '.join(RERANK_GRAPHS)}.",
                hint='Set the model\'s option "backend" to "torch" for a model of sentence-transformers.',
            )
        self._longest = longest_pair(directory)
        self._tokenizer = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
        self._padding = self._tokenizer.padding or {}
        # Pairs are padded here to the longest of their slice. Some tokenizers pad each text to 512 tokens.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._longest)
        self._session = open_session(graph, device)
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._on_cpu = self._session.get_providers()[0] == "CPUExecutionProvider"
        self.slice_characters = _CPU_CHARACTERS if self._on_cpu else _ACCELERATOR_CHARACTERS

    @property
    def max_tokens(self) -> int:
        """Return the longest pair in tokens, without special tokens."""
        return self._longest - int(self._tokenizer.num_special_tokens_to_add(True))

    def forward(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return float32 logits of shape (len(texts), labels) of pairs.

        On a processor each pair has a pass of its own. An int8 graph scales its activations by the range of the whole
        pass, so that the other pairs moved a score by up to 0.41. Larger passes are slower, too. With
        ms-marco-MiniLM-L-12-v2 one core took 1.4 s for 20 pairs of 286 tokens one by one, 2.3 s all at once.
        """
        import numpy as np

        encodings = self._tokenizer.encode_batch([(pair.query, pair.text) for pair in pairs_of(texts)])
        size = 1 if self._on_cpu else len(encodings)
        passes = [self._pass(encodings[start : start + size]) for start in range(0, len(encodings), size)]
        return np.concatenate(passes)

    def _pass(self, encodings: list[Encoding]) -> NDArray[np.float32]:
        import numpy as np

        width = max(len(encoding.ids) for encoding in encodings)
        feed = {name: self._matrix(encodings, name, width) for name in self._inputs}
        return np.asarray(self._session.run(None, feed)[0], dtype="<f4").reshape(len(encodings), -1)

    def _matrix(self, encodings: list[Encoding], name: str, width: int) -> NDArray[np.int64]:
        import numpy as np

        filler = {"input_ids": "pad_id", "token_type_ids": "pad_type_id"}.get(name, "")
        matrix = np.full((len(encodings), width), self._padding.get(filler, 0), dtype=np.int64)
        for row, encoding in zip(matrix, encodings, strict=True):
            row[: len(encoding.ids)] = getattr(encoding, FIELDS[name])
        return matrix

    def free_memory(self) -> None:
        """Do nothing, because onnxruntime's arena keeps its memory for the next pass."""

    def tokenizer(self) -> Tokenizer | None:
        """Return None, because no text is cut by a reranker's tokens."""
        return None


class TorchReranker:
    """A CrossEncoder of sentence-transformers."""

    modalities = ("text",)

    def __init__(self, settings: HostSettings) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        if (settings.device or "").startswith("cuda") and not torch.cuda.is_available():
            raise ProviderMisconfigured(
                f'cannot load model "{settings.model}": this machine offers torch no CUDA device',
                hint='Set "device" to "auto" or "cpu", or install a CUDA build of torch and its driver.',
            )
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model: Any = CrossEncoder(
            settings.model,
            revision=settings.revision,
            device=settings.device,
            model_kwargs={"dtype": settings.precision},
            trust_remote_code=False,
        )
        architectures = getattr(self._model.config, "architectures", None) or []
        if architectures and not any(name.endswith(_SCORING) for name in architectures):
            # The library gives such a model a head of random numbers, and warns in a log only.
            raise ProviderMisconfigured(
                f'model "{settings.model}" is no reranker: it is a {architectures[0]}',
                hint="Give a cross-encoder, for example cross-encoder/ms-marco-MiniLM-L6-v2.",
            )
        on_cpu = self._model.device.type == "cpu"
        self.slice_characters = _CPU_CHARACTERS if on_cpu else _ACCELERATOR_CHARACTERS

    @property
    def max_tokens(self) -> int | None:
        """Return the longest pair in tokens, without special tokens; None without a limit."""
        # The older name is deprecated since sentence-transformers 6; versions before have no other.
        is_new = hasattr(self._model, "max_seq_length")
        longest = self._model.max_seq_length if is_new else self._model.max_length
        if longest is None or longest > _NO_LIMIT:
            return None
        return int(longest) - int(self._model.tokenizer.num_special_tokens_to_add(pair=True))

    def forward(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return float32 logits of shape (len(texts), labels) of pairs."""
        import numpy as np
        import torch

        rows = self._model.predict(
            [(pair.query, pair.text) for pair in pairs_of(texts)],
            batch_size=len(texts),
            activation_fn=torch.nn.Identity(),
            show_progress_bar=False,
        )
        return np.asarray(rows, dtype="<f4").reshape(len(texts), -1)

    def free_memory(self) -> None:
        """Free the memory of a failed pass."""
        import torch

        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokenizer(self) -> Tokenizer | None:
        """Return None, because no text is cut by a reranker's tokens."""
        return None


def load_reranker(settings: HostSettings) -> OnnxReranker | TorchReranker:
    """Load the cross-encoder.

    Raises the libraries' own errors, and ProviderMisconfigured.
    """
    if settings.backend == "onnx":
        return OnnxReranker(hub.snapshot(settings, with_graph=True), settings.device)
    return TorchReranker(settings)


def pairs_of(items: Sequence[object]) -> list[Pair]:
    """Return the items as pairs.

    Raises TypeError if one is a text alone.
    """
    pairs = [item for item in items if isinstance(item, Pair)]
    if len(pairs) != len(items):
        raise TypeError("a reranker takes pairs of a query and a text")
    return pairs


def longest_pair(directory: str) -> int:
    """Return the most tokens of a pair, from the model's files.

    Special tokens are included.
    """
    found = [
        _number(os.path.join(directory, "tokenizer_config.json"), "model_max_length"),
        _number(os.path.join(directory, "config.json"), "max_position_embeddings"),
    ]
    limits = [number for number in found if number is not None and number <= _NO_LIMIT]
    return min(limits, default=_DEFAULT_TOKENS)


def _number(path: str, member: str) -> int | None:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file).get(member)
    except (OSError, ValueError, AttributeError):
        return None
    return int(value) if isinstance(value, int | float) and value > 0 else None
