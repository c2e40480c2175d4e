"""Run a prepared graph and tokenizer in onnxruntime, without torch.

sentence-transformers' own onnx backend is not used, because it needs optimum-onnx. The last release of that (0.1.0)
requires transformers before 4.58, but sentence-transformers 6 requires 5.0 or newer, so the two cannot be installed
together. Without them a host of all-MiniLM-L6-v2 in int8 is ready in 1 s instead of 6 and takes 190 MB instead of 640.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from embedline.errors import ProviderMisconfigured
from embedline.model_host.prepared import GRAPH, TOKENIZER, Manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer

    from embedline.model_host.host_settings import HostSettings

# Since 1.29 the official builds for Linux report to their maker by default, names and hashes of models included. They
# also leave files in the user's cache directory. The variable is read when the library is loaded, so
# disable_telemetry_events() comes too late.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

_CPU_CHARACTERS, _ACCELERATOR_CHARACTERS = 2048, 262_144
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class OnnxBackend:
    """A prepared ONNX model that is ready for use."""

    modalities = ("text",)

    def __init__(self, directory: str, manifest: Manifest, device: str | None) -> None:
        from tokenizers import Tokenizer

        self.max_tokens = manifest.max_tokens
        self._tokenizer = Tokenizer.from_file(os.path.join(directory, TOKENIZER))
        self._session = open_session(os.path.join(directory, GRAPH), device)
        self._inputs = [item.name for item in self._session.get_inputs()]
        on_cpu = self._session.get_providers()[0] == "CPUExecutionProvider"
        self.slice_characters = _CPU_CHARACTERS if on_cpu else _ACCELERATOR_CHARACTERS

    def forward(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return float32 rows of shape (len(texts), dimensions), not normalised."""
        import numpy as np

        encodings = self._tokenizer.encode_batch_fast(list(texts))
        feed = {name: _matrix(encodings, name) for name in self._inputs}
        (rows,) = self._session.run(None, feed)
        return np.asarray(rows, dtype="<f4")

    def free_memory(self) -> None:
        """Do nothing, because onnxruntime's arena keeps its memory for the next pass."""

    def tokenizer(self) -> Tokenizer:
        """Return a copy of the tokenizer."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self._tokenizer.to_str())


def _matrix(encodings: list[Encoding], name: str) -> NDArray[np.int64]:
    import numpy as np

    return np.array([getattr(encoding, FIELDS[name]) for encoding in encodings], dtype=np.int64)


def open_session(graph: str, device: str | None) -> Any:
    import onnxruntime

    offered = onnxruntime.get_available_providers()
    wanted = (device or "").startswith("cuda")
    if wanted and "CUDAExecutionProvider" not in offered:
        raise ProviderMisconfigured(
            "this onnxruntime has no support for CUDA",
            hint='Set "device" to "auto" or "cpu", or install onnxruntime-gpu in place of onnxruntime.',
        )
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu" and "CUDAExecutionProvider" in offered:
        number = (device or "").partition(":")[2] or "0"
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # As with OpenMP (see the launcher), spinning threads take the cores from the threads they wait for.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    if wanted and session.get_providers()[0] != "CUDAExecutionProvider":
        raise ProviderMisconfigured(
            "onnxruntime cannot use the CUDA device", hint='Set "device" to "auto" or "cpu", or repair its driver.'
        )
    return session


def check_precision(settings: HostSettings, manifest: Manifest) -> None:
    """Raise ProviderMisconfigured if a prepared directory has another precision.

    The model's options name the precision.
    """
    if manifest.precision != settings.precision:
        raise ProviderMisconfigured(
            f'the ONNX model in "{settings.model}" is {manifest.precision}, not {settings.precision}',
            hint=f'Set the model\'s option "precision" to "{manifest.precision}", or prepare it again.',
        )
