"""Read the settings of a model host from the options of a model."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import embedline
from embedline.core.embedding import ModelConfig
from embedline.errors import InvalidParameter
from embedline.model_host.choice import choose_backend, rerank_backend
from embedline.model_host.protocol import PROTOCOL_VERSION
from embedline.providers.options import Option, check_options

# Seconds from spawning to listening, before any heavy import. Measured 0.1 s; a loaded machine may need more.
START_SECONDS = 20.0
# The backend of the host of remote models; no option names it.
_REMOTE = "remote"
# Limit of that host's data in MB. A host with one model had 96 MB of data and 59 MB resident; each thread reserves 8
# more.
_REMOTE_MEMORY_MB = 1024
# Idle seconds before that host ends. It is small, and starting it costs a search the client's import, so it stays
# longer.
_REMOTE_IDLE_SECONDS = 3600.0
# Seconds after which a session without a host asks the provider itself.
_REMOTE_START_SECONDS = 5.0
PRECISIONS = {"torch": ("float32", "float16", "bfloat16"), "onnx": ("float32", "int8")}
_ALL_PRECISIONS = tuple(dict.fromkeys(name for names in PRECISIONS.values() for name in names))
# Files of the drivers of accelerators: NVIDIA's, AMD's, and that of Linux inside Windows.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def _choice(names: tuple[str, ...], hint: str) -> Option:
    return Option(lambda value: value in names, " or ".join(f'"{name}"' for name in names), hint)


_OPTIONS = {
    "backend": _choice(("auto", *PRECISIONS), 'onnx is faster on processors: options => \'{"backend": "onnx"}\'.'),
    "precision": _choice(
        ("auto", *_ALL_PRECISIONS),
        'For example options => \'{"backend": "onnx", "precision": "int8"}\' on a processor.',
    ),
    "device": Option(
        lambda value: isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None,
        '"auto", "cpu", "cuda" or "cuda:N"',
        "Leave it out: the host then takes an accelerator where there is one.",
    ),
    "memory_limit_mb": Option(
        lambda value: type(value) is int and value > 0, "a positive whole number", "In MB; the default is 4096."
    ),
    "idle_seconds": Option(
        lambda value: type(value) in (int, float) and value > 0, "a positive number", "In seconds; the default is 900."
    ),
    # Not a setting of the host: the chunker's limit, in place of the model's own.
    "max_tokens": Option(
        lambda value: type(value) is int and value > 0, "a positive whole number", "Leave it out: the model knows."
    ),
}


@dataclass(frozen=True)
class HostSettings:
    """The settings that a host needs to load its model and to limit itself.

    `backend` is torch, onnx, static or towers; auto for a model of the hub, because the host has yet to see its files.
    `precision` auto is float32, or half precision on an accelerator if the vectors are the same.
    """

    model: str
    revision: str | None = None
    backend: str = "torch"
    device: str | None = None
    precision: str = "float32"
    memory_limit_mb: int = 4096
    idle_seconds: float = 900.0
    start_seconds: float = START_SECONDS
    task: str = "embed"

    @property
    def reranks(self) -> bool:
        """Return True if the model scores pairs of a query and a text."""
        return self.task == "rerank"

    @property
    def may_use_accelerator(self) -> bool:
        """Return True if the model may run on an accelerator of this machine."""
        if self.backend in ("static", _REMOTE) or self.device == "cpu":
            return False
        return self.device is not None or any(map(os.path.exists, _DRIVERS))

    @property
    def is_remote(self) -> bool:
        """Return True if the host has no model of its own.

        It asks the providers of remote models.
        """
        return self.backend == _REMOTE

    @property
    def name(self) -> str:
        """Return a short name for the settings that decide the vectors.

        Two configs that differ only in other settings share one host.
        """
        identity = [PROTOCOL_VERSION, embedline.__version__, self.model, self.revision, self.backend]
        identity += [self.device, self.precision, *([self.task] if self.reranks else [])]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def remote_settings() -> HostSettings:
    """Return the settings of the server's one host of remote models."""
    return HostSettings(
        "remote models",
        # Workers keep the host running, so it would outlive a change of the package's code that keeps the version.
        revision=_code_stamp(),
        backend=_REMOTE,
        memory_limit_mb=_REMOTE_MEMORY_MB,
        idle_seconds=_REMOTE_IDLE_SECONDS,
        start_seconds=_REMOTE_START_SECONDS,
    )


@functools.cache
def _code_stamp() -> str:
    """Return a text that changes with the code that the host runs."""
    package = os.path.dirname(embedline.__file__)
    folders = [os.path.join(package, name) for name in ("core", "model_host", "providers")]
    sources = [entry for folder in folders for entry in os.scandir(folder) if entry.name.endswith(".py")]
    return str(max((entry.stat().st_mtime_ns for entry in sources), default=0))


def settings_of(config: ModelConfig) -> HostSettings:
    """Return the host's settings from the model's options.

    Raises InvalidParameter, which names the option.
    """
    given = {name: value for name, value in config.options.items() if value is not None}
    check_options(config.name, given, _OPTIONS)
    # "auto" spells out the default, so that both share one host.
    fields = {name: given[name] for name in given if name != "max_tokens" and given[name] != "auto"}
    if config.task == "rerank":
        fields |= {"task": config.task, "backend": fields.get("backend") or rerank_backend(config.model)}
        if fields["backend"] == "onnx" and "precision" in fields:
            raise InvalidParameter(
                f'option "precision" of model "{config.name}": the graph of a reranker is used as it is',
                hint="Leave the option out, and give a directory whose model.onnx has the precision that you want.",
            )
    if "backend" in fields and config.task == "embed" and choose_backend(config.model) == "towers":
        raise InvalidParameter(
            f'option "backend" of model "{config.name}": its towers name their own files', hint="Leave the option out."
        )
    fields.setdefault("backend", _backend_of(config.model, fields))
    backend, precision = fields["backend"], fields.get("precision", "float32")
    offered = PRECISIONS.get(backend, ("float32",))
    if precision not in offered:
        others = [other for other, names in PRECISIONS.items() if precision in names]
        raise InvalidParameter(
            f'option "precision" of model "{config.name}": backend {backend} has no {precision}',
            hint=f'Add "backend": "{others[0]}", or choose {" or ".join(offered)}.',
        )
    settings = HostSettings(model=config.model, revision=config.revision, **fields)
    # A processor is slower in half precision, so a machine without an accelerator has nothing to choose.
    is_open = "precision" not in fields and backend in ("torch", "auto") and not settings.reranks
    return replace(settings, precision="auto") if is_open and settings.may_use_accelerator else settings


def _backend_of(model: str, fields: dict[str, Any]) -> str:
    """Return the backend of a model whose options name none."""
    on_cpu = not str(fields.get("device", "")).startswith("cuda")
    if os.path.isdir(model):
        chosen = choose_backend(model)
        # numpy has neither other precisions nor accelerators. A model prepared for onnxruntime has only its own form.
        return (
            "torch"
            if chosen == "static" and not (on_cpu and fields.get("precision", "float32") == "float32")
            else chosen
        )
    return "auto" if on_cpu and fields.get("precision", "float32") == "float32" else "torch"
