"""The model itself: loading it, encoding texts and telling what it is. Runs in the model host only."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from embedline.errors import InputRejected, ModelHostUnavailable, ProviderError, ProviderMisconfigured
from embedline.model_host.scheduler import SliceLimits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from embedline.model_host.launcher import HostSettings

# What a query waits for behind documents. Measured on 2 shared cores: all-MiniLM-L6-v2 reads 28 texts of 900 characters
# a second in slices of 4 (0.15 s each) and 20 in slices of 32 (1.6 s each); a static model 6,000 in slices of 256
# (0.04 s each), no more in larger ones.
CPU_SLICE = SliceLimits(texts=32, characters=4096)
ACCELERATOR_SLICE = SliceLimits(texts=256, characters=262_144)
STATIC_SLICE = SliceLimits(texts=256, characters=262_144)
_DETAIL_CHARACTERS = 500
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "failed to allocate memory",
    "bad_alloc",
)
_DEVICE_FAULTS = ("cuda error", "device-side assert", "hip error")


class LoadedModel:
    """A sentence-transformers model that is ready for use."""

    def __init__(self, settings: HostSettings, model: SentenceTransformer) -> None:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        self._settings = settings
        self._model = model
        self._is_static = isinstance(model[0], StaticEmbedding)
        # The first pass is slow; it also tells the true width.
        self.dimensions = int(self._forward(["warm up"]).shape[1])
        if self._is_static:
            self.limits = STATIC_SLICE
        else:
            self.limits = CPU_SLICE if model.device.type == "cpu" else ACCELERATOR_SLICE

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return float32 rows of shape (len(texts), dimensions), not normalised.

        A lack of memory halves the texts until they fit. Raises InputRejected for texts that the model cannot take.
        """
        import numpy as np

        try:
            return self._forward(texts)
        except Exception as error:
            if is_device_fault(error):
                raise
            if not is_out_of_memory(error):
                raise InputRejected("the model failed on the texts", detail=describe(error)) from error
        # Outside the handler: while it runs, the traceback keeps the tensors of the failed pass alive.
        self._free_memory()
        if len(texts) == 1:
            raise InputRejected(
                f"a text of {len(texts[0])} characters does not fit in the model host's memory",
                detail=f"The limit is {self._settings.memory_limit_mb} MB.",
                hint="Raise the model's option memory_limit_mb, or make chunks smaller.",
            )
        half = len(texts) // 2
        return np.concatenate((self.encode(texts[:half]), self.encode(texts[half:])))

    def _forward(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        # The empty prompt shuts out a default prompt of the model's own config: prefixes are the client's business.
        rows = self._model.encode(list(texts), prompt="", batch_size=len(texts), show_progress_bar=False)
        return np.asarray(rows, dtype="<f4")

    def _free_memory(self) -> None:
        import torch

        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def describe(self, tokenizer_path: str) -> dict[str, Any]:
        """Return the fields of ModelInfo; writes the tokenizer to tokenizer_path."""
        return {
            "dimensions": self.dimensions,
            "max_tokens": self._max_tokens(),
            "tokenizer_path": self._save_tokenizer(tokenizer_path),
            "fingerprint": self._fingerprint(),
        }

    def _max_tokens(self) -> int | None:
        longest = self._model.max_seq_length
        if self._is_static or longest is None or math.isinf(longest):
            return None
        return int(longest) - int(self._model.tokenizer.num_special_tokens_to_add(pair=False))

    def _save_tokenizer(self, path: str) -> str | None:
        from tokenizers import Tokenizer

        own = self._model.tokenizer
        fast = own if isinstance(own, Tokenizer) else getattr(own, "backend_tokenizer", None)
        if not isinstance(fast, Tokenizer):
            return None
        # A copy: the model needs its truncation and padding, whoever counts tokens needs neither.
        tokenizer = Tokenizer.from_str(fast.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8", opener=_open_private) as file:
            file.write(tokenizer.to_str())
        os.replace(temporary, path)
        return path

    def _fingerprint(self) -> str:
        identity = {
            "weights": weights_identity(self._settings),
            "backend": self._settings.backend,
            "precision": self._settings.precision,
            "dimensions": self.dimensions,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def load_model(settings: HostSettings) -> LoadedModel:
    """Load the model; raises ProviderMisconfigured where only a person can help, else ModelHostUnavailable."""
    if os.path.isabs(settings.model) and not os.path.isdir(settings.model):
        # Before the imports, which take seconds.
        raise ProviderMisconfigured(
            f'model directory "{settings.model}" does not exist or cannot be read by the server',
            hint="Give the directory of a sentence-transformers model, readable by the server's operating-system user.",
        )
    try:
        return _load(settings)
    except Exception as error:
        raise _load_error(settings, error) from error


def _load(settings: HostSettings) -> LoadedModel:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if settings.backend == "torch":
        # Explicit, for the default is whatever the weights were saved in.
        model_kwargs = {"dtype": settings.precision}
    else:
        model_kwargs = {"file_name": settings.model_file} if settings.model_file else {}
    model = SentenceTransformer(
        settings.model,
        revision=settings.revision,
        backend=settings.backend,  # type: ignore[arg-type]  # checked by the library itself
        device=settings.device,
        model_kwargs=model_kwargs,
        trust_remote_code=False,
    )
    return LoadedModel(settings, model)


def _load_error(settings: HostSettings, error: Exception) -> ProviderError:
    message = f'cannot load model "{settings.model}"'
    if is_out_of_memory(error):
        return ProviderMisconfigured(
            f"{message}: it does not fit in {settings.memory_limit_mb} MB",
            detail=describe(error),
            hint="Raise the model's option memory_limit_mb.",
        )
    if isinstance(error, ImportError):
        hint = "Install what is missing into the server's Python: pip install 'embedline[local]'."
        return ProviderMisconfigured(message, detail=describe(error), hint=hint)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not offline and (isinstance(error, ConnectionError | TimeoutError) or "couldn't connect" in str(error).lower()):
        return ModelHostUnavailable(message, detail=describe(error))
    return ProviderMisconfigured(message, detail=describe(error))


def describe(error: BaseException) -> str:
    """The error in one bounded line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_DETAIL_CHARACTERS]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: torch, CUDA and onnxruntime each say it in another class."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def is_device_fault(error: BaseException) -> bool:
    """Whether the accelerator is lost to this process, so that only a new process can go on."""
    return not is_out_of_memory(error) and any(words in str(error).lower() for words in _DEVICE_FAULTS)


def weights_identity(settings: HostSettings) -> str:
    """Name the weights, independent of where they lie and of the libraries that read them.

    A directory is known by the content of its weights, tokenizer and module list; a model of the hub by its commit.
    """
    if os.path.isdir(settings.model):
        digest = hashlib.sha256()
        for relative in sorted(_identity_files(settings)):
            with open(os.path.join(settings.model, relative), "rb") as file:
                digest.update(f"{relative}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(settings.model, revision=settings.revision, local_files_only=True)
    return f"{settings.model}@{os.path.basename(snapshot)}"


def _identity_files(settings: HostSettings) -> Iterable[str]:
    found = [
        os.path.relpath(os.path.join(folder, name), settings.model)
        for folder, _, names in os.walk(settings.model)
        for name in names
    ]
    small = [path for path in found if os.path.basename(path) in ("tokenizer.json", "modules.json")]
    # Pooling, dense layers and the sequence limit change vectors as much as weights do.
    small += [path for path in found if path == "sentence_bert_config.json" or path.endswith("/config.json")]
    suffixes = {"onnx": (".onnx", ".onnx_data"), "openvino": (".xml", ".bin")}.get(settings.backend, (".safetensors",))
    weights = [path for path in found if path.endswith(suffixes)]
    if settings.model_file:
        weights = [path for path in weights if path.startswith(settings.model_file)] or weights
    if not weights:
        weights = [path for path in found if path.endswith((".bin", ".safetensors"))]
    return {*small, *weights}
