"""Load a model, encode texts and describe the model, in the model host only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from embedline.core.reranking import Pair
from embedline.errors import InputRejected, ProviderError, ProviderMisconfigured
from embedline.model_host import hub, onnx_export
from embedline.model_host.faults import describe, is_device_fault, is_out_of_memory, load_error
from embedline.model_host.onnx_backend import OnnxBackend, check_precision
from embedline.model_host.prepared import RECIPE, read_manifest
from embedline.model_host.rerank_backends import load_reranker
from embedline.model_host.slicing import SliceTuner
from embedline.model_host.static_backend import StaticBackend
from embedline.model_host.torch_backend import load_torch
from embedline.model_host.weights import weights_identity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from embedline.model_host.host_settings import HostSettings
    from embedline.model_host.scheduler import Item, SliceLimits


class Backend(Protocol):
    """A model in memory, in torch, in onnxruntime or as a table of vectors.

    The search for the best slice begins at `slice_characters`. `max_tokens` is without special tokens, None if there is
    no limit.
    """

    slice_characters: int

    @property
    def max_tokens(self) -> int | None: ...

    def forward(self, texts: Sequence[Any]) -> NDArray[np.float32]:
        """Return float32 rows of shape (len(texts), dimensions), not normalised.

        A reranker takes pairs in place of texts, and its rows have one value. Raises the library's own errors.
        """

    def free_memory(self) -> None:
        """Free the memory of a failed pass."""

    def tokenizer(self) -> Tokenizer | None:
        """Return a copy of the tokenizer, None if it is not of the tokenizers library."""


class LoadedModel:
    """A model that is ready for use."""

    def __init__(self, settings: HostSettings, backend: Backend) -> None:
        self._settings = settings
        self._backend = backend
        self._slices = SliceTuner(backend.slice_characters)
        # The first pass is slow. It also shows the true width.
        first = Pair("warm", "up") if settings.reranks else "warm up"
        self.dimensions = int(backend.forward([first]).shape[1])
        if settings.reranks and self.dimensions != 1:
            raise ProviderMisconfigured(
                f'model "{settings.model}" is no reranker: it returns {self.dimensions} values for a pair',
                hint="Give a cross-encoder with one label, for example cross-encoder/ms-marco-MiniLM-L6-v2.",
            )

    @property
    def limits(self) -> SliceLimits:
        """Return the limits of the next slice."""
        return self._slices.limits

    def encode(self, texts: Sequence[Item]) -> NDArray[np.float32]:
        """Return float32 rows of shape (len(texts), dimensions), not normalised.

        A lack of memory halves the texts until they fit, and later slices stay as small. Raises InputRejected for texts
        that the model cannot take.
        """
        import numpy as np

        lengths = [len(text) for text in texts]
        start = time.perf_counter()
        try:
            rows = self._backend.forward(texts)
        except Exception as error:
            if is_device_fault(error):
                raise
            if not is_out_of_memory(error):
                raise InputRejected("the model failed on the texts", detail=describe(error)) from error
        else:
            self._slices.note(lengths, time.perf_counter() - start)
            return rows
        # Outside the handler, because the traceback keeps the tensors of the failed pass alive while the handler runs.
        self._backend.free_memory()
        if len(texts) == 1:
            raise InputRejected(
                f"a text of {len(texts[0])} characters does not fit in the model host's memory",
                detail=f"The limit is {self._settings.memory_limit_mb} MB.",
                hint="Raise the model's option memory_limit_mb, or make chunks smaller.",
            )
        self._slices.shrink(lengths)
        half = len(texts) // 2
        return np.concatenate((self.encode(texts[:half]), self.encode(texts[half:])))

    def describe(self, tokenizer_path: str) -> dict[str, Any]:
        """Return the fields of ModelInfo; writes the tokenizer to tokenizer_path."""
        return {
            "dimensions": 0 if self._settings.reranks else self.dimensions,
            "max_tokens": self._backend.max_tokens,
            "tokenizer_path": self._save_tokenizer(tokenizer_path),
            "fingerprint": self._fingerprint(),
        }

    def _save_tokenizer(self, path: str) -> str | None:
        tokenizer = self._backend.tokenizer()
        if tokenizer is None:
            return None
        # The model needs its truncation and padding, but counting tokens needs neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Two sessions may ask at the same time, each in a thread of its own.
        temporary = f"{path}.{secrets.token_hex(4)}"
        with open(temporary, "w", encoding="utf-8", opener=_open_private) as file:
            file.write(tokenizer.to_str())
        os.replace(temporary, path)
        return path

    def _fingerprint(self) -> str:
        identity = {
            "weights": weights_identity(self._settings),
            # numpy gives a static model the vectors that torch gives it, so the library that computes the mean does not
            # change the model.
            "backend": "torch" if self._settings.backend == "static" else self._settings.backend,
            "precision": self._settings.precision,
            "dimensions": self.dimensions,
        }
        if self._settings.reranks:
            identity["task"] = self._settings.task
        elif self._settings.backend == "onnx":
            identity["recipe"] = RECIPE
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def load_model(settings: HostSettings) -> LoadedModel:
    """Load the model.

    Raises ProviderMisconfigured if only a person can help, else ModelHostUnavailable.
    """
    if os.path.isabs(settings.model) and not os.path.isdir(settings.model):
        # Before the imports, which take seconds.
        raise ProviderMisconfigured(
            f'model directory "{settings.model}" does not exist or cannot be read by the server',
            hint="Give the directory of a sentence-transformers model, readable by the server's operating-system user.",
        )
    try:
        hub.require_hub(settings)
        if settings.reranks:
            return LoadedModel(settings, load_reranker(settings))
        directory = settings.model
        if settings.backend == "auto":
            static = hub.chosen_directory(settings)
            settings = dataclasses.replace(settings, backend="torch" if static is None else "static")
            directory = static or directory
        return LoadedModel(settings, _load_backend(settings, directory))
    except ProviderError:
        raise
    except Exception as error:
        raise load_error(settings, error) from error


def _load_backend(settings: HostSettings, directory: str) -> Backend:
    if settings.backend == "static":
        return StaticBackend(directory)
    return _load_onnx(settings) if settings.backend == "onnx" else load_torch(settings)


def _load_onnx(settings: HostSettings) -> OnnxBackend:
    """Load a prepared model.

    If it is not prepared yet, it is prepared first, once for all hosts.
    """
    directory = settings.model
    manifest = read_manifest(directory)
    if manifest is None:
        directory = onnx_export.prepare(settings)
        manifest = read_manifest(directory)
    if manifest is None:
        raise ProviderMisconfigured(f'the prepared model in "{directory}" has no manifest')
    check_precision(settings, manifest)
    return OnnxBackend(directory, manifest, settings.device)
