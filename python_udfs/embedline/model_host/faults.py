"""Classify the errors of torch, CUDA, onnxruntime and transformers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from embedline.errors import ModelHostUnavailable, ProviderError, ProviderMisconfigured

if TYPE_CHECKING:
    from embedline.model_host.host_settings import HostSettings

_DETAIL_CHARACTERS = 500
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "failed to allocate memory",
    "bad_alloc",
)
_DEVICE_FAULTS = ("cuda error", "device-side assert", "hip error", "cuda failure")


def describe(error: BaseException) -> str:
    """Return the error in one bounded line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_DETAIL_CHARACTERS]


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory was short.

    torch, CUDA and onnxruntime each raise another class for it.
    """
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def is_device_fault(error: BaseException) -> bool:
    """Return True if the accelerator is lost to this process.

    Only a new process can go on.
    """
    return not is_out_of_memory(error) and any(words in str(error).lower() for words in _DEVICE_FAULTS)


def load_error(settings: HostSettings, error: Exception) -> ProviderError:
    """Return the error of loading or preparing a model.

    It is ProviderMisconfigured if only a person can help.
    """
    if isinstance(error, ProviderError):
        return error
    message = f'cannot load model "{settings.model}"'
    if is_out_of_memory(error):
        return ProviderMisconfigured(
            f"{message}: it does not fit in {settings.memory_limit_mb} MB",
            detail=describe(error),
            hint="Raise the model's option memory_limit_mb.",
        )
    if isinstance(error, ImportError):
        extras = "local"
        if settings.backend == "onnx":
            extras = "onnx" if "onnx" in str(error) else "local,onnx"
        elif settings.backend == "towers":
            extras = "media,onnx"
        elif any(name in str(error) for name in ("PIL", "soundfile", "soxr")):
            extras = "media"
        hint = f"Install what is missing into the server's Python: pip install 'embedline[{extras}]'."
        if settings.backend not in ("onnx", "towers"):
            hint += (
                ' Models of the BERT family run without torch: options => \'{"backend": "onnx"}\''
                " (pip install 'embedline[onnx]')."
            )
        return ProviderMisconfigured(message, detail=describe(error), hint=hint)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not offline and (isinstance(error, ConnectionError | TimeoutError) or "couldn't connect" in str(error).lower()):
        return ModelHostUnavailable(message, detail=describe(error))
    return ProviderMisconfigured(message, detail=describe(error))
