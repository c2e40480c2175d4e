"""Load a model, encode texts and describe the model, in the model host only."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from embedline.core.media import harmless_input
from embedline.core.reranking import Pair
from embedline.errors import InputRejected, ProviderError, ProviderMisconfigured
from embedline.model_host import hub, onnx_export
from embedline.model_host.faults import describe, is_device_fault, is_out_of_memory, load_error
from embedline.model_host.flat_transformer import flat_transformer
from embedline.model_host.onnx_backend import OnnxBackend, check_precision
from embedline.model_host.precision import FULL, half_if_equal
from embedline.model_host.prepared import RECIPE, read_manifest
from embedline.model_host.rerank_backends import load_reranker
from embedline.model_host.slicing import MAX_SLICE_SECONDS, SliceTuner
from embedline.model_host.static_backend import StaticBackend
from embedline.model_host.tokens import CHARACTERS_PER_TOKEN
from embedline.model_host.torch_backend import is_on_cuda, load_torch
from embedline.model_host.weights import weights_identity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from embedline.model_host.flat_transformer import FlatModel
    from embedline.model_host.host_settings import HostSettings
    from embedline.model_host.scheduler import Item, SliceLimits
    from embedline.model_host.tokens import Tokens


class Backend(Protocol):
    """A model in memory, in torch, in onnxruntime or as a table of vectors.

    The search for the best slice begins at `slice_characters`. `max_tokens` is without special tokens, None if there is
    no limit.
    """

    slice_characters: int

    @property
    def modalities(self) -> tuple[str, ...]: ...

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


@dataclass(frozen=True)
class Slice:
    """Texts for one pass, with their tokens if these are known."""

    texts: Sequence[Item]
    tokens: Tokens | None = None

    @property
    def lengths(self) -> list[int]:
        """Return the size of each text in characters, from its tokens if these are known."""
        if self.tokens is None:
            return [len(text) for text in self.texts]
        lengths: list[int] = (CHARACTERS_PER_TOKEN * self.tokens.lengths).tolist()
        return lengths

    def part(self, first: int, last: int) -> Slice:
        """Return some of the texts."""
        tokens = None if self.tokens is None else self.tokens.select(range(first, last))
        return Slice(self.texts[first:last], tokens)


@dataclass(frozen=True)
class Running:
    """A slice that the model has begun.

    `rows` waits for its vectors, or raises the library's own error.
    """

    slice: Slice
    since: float
    rows: Callable[[], NDArray[np.float32]]


class LoadedModel:
    """A model that is ready for use.

    `flat` takes the texts of a model that can be given token ids; the backend's forward is then not used.
    """

    def __init__(self, settings: HostSettings, backend: Backend, flat: FlatModel | None = None) -> None:
        self._settings = settings
        self._backend = backend
        self.flat = flat
        self.in_flight = 1 if flat is None else flat.in_flight
        self._slices = SliceTuner(backend.slice_characters, MAX_SLICE_SECONDS / self.in_flight)
        self._ended = 0.0
        # The first pass is slow. It also shows the true width, and whether files can be decoded.
        firsts: list[Item] = [harmless_input([modality], "warm up") for modality in backend.modalities]
        widths = [
            int(self._start(Slice([first]))().shape[1])
            for first in ([Pair("warm", "up")] if settings.reranks else firsts)
        ]
        self.dimensions = widths[0]
        # Answers carry it, because a session cannot tell by a vector of one tower which the others are.
        self.identity = self._fingerprint() if len(backend.modalities) > 1 else None
        if len(set(widths)) > 1:
            raise ProviderMisconfigured(
                f'the towers of model "{settings.model}" have {" and ".join(map(str, widths))} dimensions',
                hint="Towers of one space give vectors of the same dimensions.",
            )
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
        """Return float32 rows of shape (len(texts), dimensions), not normalised."""
        return self.finish(self.begin(Slice(texts)))

    def begin(self, given: Slice) -> Running:
        """Begin a slice.

        Slices end in the order in which they began. A device that is lost raises the library's own error.
        """
        since = time.perf_counter()
        try:
            rows = self._start(given)
        except Exception as error:
            if is_device_fault(error):
                raise
            # Without its traceback, which would keep the tensors of the failed pass alive.
            rows = functools.partial(_fail, error.with_traceback(None))
        return Running(given, since, rows)

    def finish(self, running: Running) -> NDArray[np.float32]:
        """Return the rows of a slice that has begun, in the order of its texts.

        A lack of memory halves the texts until they fit, and later slices stay as small. Raises InputRejected for texts
        that the model cannot take.
        """
        import numpy as np

        given = running.slice
        try:
            rows = running.rows()
        except Exception as error:
            if is_device_fault(error) or isinstance(error, InputRejected):
                # Also of a file that cannot be decoded.
                raise
            if not is_out_of_memory(error):
                raise InputRejected("the model failed on the texts", detail=describe(error)) from error
        else:
            now = time.perf_counter()
            # The time for which the device had this slice and no earlier one.
            self._slices.note(given.lengths, now - max(running.since, self._ended))
            self._ended = now
            return rows
        # Outside the handler, because the traceback keeps the tensors of the failed pass alive while the handler runs.
        self._backend.free_memory()
        texts = given.texts
        if len(texts) == 1:
            raise InputRejected(
                f"a text of {len(texts[0])} characters does not fit in the model host's memory",
                detail=f"The limit is {self._settings.memory_limit_mb} MB.",
                hint="Raise the model's option memory_limit_mb, or make chunks smaller.",
            )
        self._slices.shrink(given.lengths)
        half = len(texts) // 2
        halves = (given.part(0, half), given.part(half, len(texts)))
        return np.concatenate([self.finish(self.begin(part)) for part in halves])

    def _start(self, given: Slice) -> Callable[[], NDArray[np.float32]]:
        if self.flat is not None and isinstance(given.texts[0], str):
            tokens = given.tokens
            return self.flat.start(self.flat.tokenize(list(map(str, given.texts))) if tokens is None else tokens)
        rows = self._backend.forward(given.texts)
        return lambda: rows

    def describe(self, tokenizer_path: str) -> dict[str, Any]:
        """Return the fields of ModelInfo; writes the tokenizer to tokenizer_path."""
        return {
            "dimensions": 0 if self._settings.reranks else self.dimensions,
            "max_tokens": self._backend.max_tokens,
            "tokenizer_path": self._save_tokenizer(tokenizer_path),
            "fingerprint": self._fingerprint(),
            "modalities": list(self._backend.modalities),
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
            # A precision that is left open has the vectors of float32.
            "precision": "float32" if self._settings.precision == "auto" else self._settings.precision,
            "dimensions": self.dimensions,
        }
        if self._settings.reranks:
            identity["task"] = self._settings.task
        elif self._settings.backend == "onnx":
            identity["recipe"] = RECIPE
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _fail(error: Exception) -> NDArray[np.float32]:
    raise error


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
        if settings.backend == "torch":
            return _load_torch(settings)
        if settings.backend == "towers":
            from embedline.model_host.towers_backend import TowersBackend

            return LoadedModel(settings, TowersBackend(directory, settings.device))
        return LoadedModel(settings, StaticBackend(directory) if settings.backend == "static" else _load_onnx(settings))
    except ProviderError:
        raise
    except Exception as error:
        raise load_error(settings, error) from error


def _load_torch(settings: HostSettings) -> LoadedModel:
    def load(precision: str) -> LoadedModel:
        backend = load_torch(dataclasses.replace(settings, precision=precision))
        # The model keeps the settings: with a precision that is left open, its fingerprint is that of float32.
        return LoadedModel(settings, backend, flat_transformer(backend.model))

    if settings.precision != "auto":
        return load(settings.precision)
    if not is_on_cuda(settings):
        return load(FULL)
    return half_if_equal(load, LoadedModel.encode)[0]


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
