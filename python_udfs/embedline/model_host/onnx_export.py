"""Prepare a model for onnxruntime, once: to ONNX, then to int8 if asked for.

The graph holds the whole sentence-transformers model, pooling and normalisation included, so the host needs neither
library to run it. A plain BERT is written from its weights (bert_graph.py); torch exports every other model. Preparing
takes seconds, and gigabytes with torch, so the host leaves it to a process of its own. `python -m
embedline.model_host.onnx_export JSON` answers with one JSON object.

Measured with all-MiniLM-L6-v2 (AVX-512 VNNI, CPU time per text of 900 characters; mean and least cosine to torch
float32):

    torch                                     68 ms
    float32, TorchScript exporter             38 ms
    float32, torch.export exporter            46 ms   onnxruntime fuses less of its graph
    int8, one scale per matrix                21 ms   0.943  0.906
    uint8, one scale per column               27 ms   0.994  0.990
    int8, one scale per column                19 ms   0.994  0.991
    the same in 7 bits                        21 ms   0.993  0.988

The last one is the meaning of `int8` here, on every processor. With 8 bits, AVX2 and AVX-512 without VNNI overflow and
give other vectors. A replica on other hardware must embed a query as the primary embedded the documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from embedline import errors
from embedline.errors import ModelHostUnavailable, ProviderError, ProviderMisconfigured
from embedline.model_host import bert_graph, hub
from embedline.model_host.bert_graph import Bert
from embedline.model_host.faults import describe, load_error
from embedline.model_host.host_settings import HostSettings
from embedline.model_host.onnx_backend import OnnxBackend
from embedline.model_host.prepared import (
    GRAPH,
    TOKENIZER,
    Manifest,
    cache_root,
    cached_path,
    read_manifest,
    write_manifest,
)
from embedline.model_host.torch_backend import TorchBackend, load_torch
from embedline.model_host.weights import weights_identity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

_OPSET = 17
# Bytes above which a model keeps its weights in a file beside the graph, because protobuf holds 2 GB.
_LARGE_BYTES = 1_800_000_000
# Texts for comparing the export with torch. Their lengths differ, and one is longer than most models read.
_SAMPLES = (
    "tree",
    "Autovacuum removes dead rows.",
    "  How do I restore a single table from a dump of the whole database? ",
    "Ein Index beschleunigt die Suche, aber jede Änderung der Tabelle muss auch ihn ändern.",
    "A query planner estimates how many rows each step returns; where the estimate is wrong, the plan is slow.\n" * 3,
    "The cat sat on the mat, and the dog, who had been asleep, looked up at once. " * 12,
    "In 1969, four computers were connected: the first message was meant to be LOGIN, and two letters arrived. " * 40,
)
# Least mean cosine between the prepared model and the original: above rounding, below any mistake.
_MIN_COSINE = {"float32": 0.999, "int8": 0.96}


def prepare(settings: HostSettings) -> str:
    """Return the directory of the model in ONNX form, prepared if it is missing.

    Raises ProviderError.
    """
    root = cache_root()
    with contextlib.suppress(OSError):
        # The weights of a model of the hub may not be here yet. Fetching them is part of preparing.
        path = cached_path(root, weights_identity(settings), settings.precision)
        if read_manifest(path) is not None:
            return path
    return _prepare_apart(settings)


def _prepare_apart(settings: HostSettings) -> str:
    """Prepare in a process of its own.

    The memory that torch takes is freed with it. If the process dies, the host reports its status.
    """
    command = [sys.executable, "-P", "-m", __name__, json.dumps(dataclasses.asdict(settings))]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise ModelHostUnavailable(
            f'preparing model "{settings.model}" for onnxruntime ended with status {done.returncode}',
            hint="If it ran out of memory, raise the model's option memory_limit_mb.",
        ) from None
    if "error" in answer:
        fields = answer["error"]
        raise getattr(errors, fields["class"])(fields["message"], detail=fields["detail"], hint=fields["hint"])
    return str(answer["directory"])


def prepare_here(settings: HostSettings) -> str:
    """Prepare in this process, into the cache.

    Two hosts that need the same model wait for each other.
    """
    source = _open_source(settings)
    root = cache_root()
    path = cached_path(root, weights_identity(settings), settings.precision)
    with _locked(f"{path}.lock"):
        if read_manifest(path) is None:
            _write_whole(source, settings, path)
    return path


def export(model: str, target: str, precision: str, revision: str | None = None) -> Manifest:
    """Prepare a model into a directory that must not exist yet.

    Returns the manifest of the model. Raises ProviderError.
    """
    if os.path.lexists(target):
        raise ProviderMisconfigured(f'"{target}" exists already', hint="Name a directory that is to be made.")
    settings = HostSettings(model=model, revision=revision, backend="onnx", precision=precision)
    try:
        hub.require_hub(settings)
        return _write_whole(_open_source(settings), settings, target)
    except Exception as error:
        raise load_error(settings, error) from error


def _open_source(settings: HostSettings) -> Bert | TorchBackend:
    """Return the source of the export.

    It is a BERT's files, or any other model in torch, in float32 and on the processor.
    """
    bert = bert_graph.read(hub.snapshot(settings))
    if bert is not None:
        return bert
    in_torch = dataclasses.replace(settings, backend="torch", precision="float32", device="cpu")
    return load_torch(in_torch, attn_implementation="eager")


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _write_whole(source: Bert | TorchBackend, settings: HostSettings, target: str) -> Manifest:
    """Write the prepared model beside its place, then move it there.

    No reader ever finds an incomplete model.
    """
    target = os.path.abspath(target)
    # Not mkdtemp, because the umask decides who may read a model prepared for others. The cache is protected by its
    # root.
    temporary = f"{target}.{secrets.token_hex(4)}"
    os.mkdir(temporary)
    try:
        manifest = _write(source, settings, temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _write(source: Bert | TorchBackend, settings: HostSettings, directory: str) -> Manifest:
    tokenizer = source.tokenizer() if isinstance(source, Bert) else _padding_tokenizer(source, settings)
    tokenizer.save(os.path.join(directory, TOKENIZER))
    with tempfile.TemporaryDirectory(prefix="float32-", dir=directory) as folder:
        # Without torch the int8 graph is compared with the float32 one.
        exported = folder if settings.precision == "int8" else directory
        plain = os.path.join(exported, GRAPH)
        if isinstance(source, Bert):
            source.write(plain)
            shutil.copy(os.path.join(directory, TOKENIZER), folder)
            manifest = Manifest(weights_identity(settings), settings.precision, source.dimensions, source.max_tokens)
            wanted = OnnxBackend(exported, manifest, "cpu").forward(_SAMPLES)
        else:
            _export_graph(source, plain)
            wanted = source.forward(_SAMPLES)
            manifest = Manifest(weights_identity(settings), settings.precision, int(wanted.shape[1]), source.max_tokens)
        if settings.precision == "int8":
            _quantise(plain, os.path.join(directory, GRAPH))
    _check(wanted, OnnxBackend(directory, manifest, "cpu").forward(_SAMPLES), settings)
    write_manifest(directory, manifest)
    return manifest


def _padding_tokenizer(source: TorchBackend, settings: HostSettings) -> Tokenizer:
    """Return the tokenizer with transformers' truncation and padding."""
    tokenizer = source.tokenizer()
    if tokenizer is None or source.is_static:
        raise ProviderMisconfigured(
            f'model "{settings.model}" has no ONNX form: '
            + ("it is static, a table of token vectors" if source.is_static else "its tokenizer is not a fast one"),
            hint='Leave the option "backend" out.',
        )
    own = source.model.tokenizer
    tokenizer.no_truncation()
    if source.max_tokens is not None and source.model.max_seq_length is not None:
        tokenizer.enable_truncation(int(source.model.max_seq_length), direction=own.truncation_side)
    tokenizer.enable_padding(
        direction=own.padding_side, pad_id=own.pad_token_id, pad_type_id=own.pad_token_type_id, pad_token=own.pad_token
    )
    return tokenizer


def _export_graph(source: TorchBackend, path: str) -> None:
    import torch

    features = source.model.preprocess(["two texts", "of different length, so that padding is seen"])
    inputs = {name: value for name, value in features.items() if isinstance(value, torch.Tensor) and value.ndim == 2}

    class Whole(torch.nn.Module):  # type: ignore[misc] # its types are not read, see pyproject.toml
        """Return sentence embeddings of token ids."""

        def __init__(self) -> None:
            super().__init__()
            self.model = source.model.eval()

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            embedding: torch.Tensor = self.model(dict(zip(inputs, values, strict=True)))["sentence_embedding"]
            return embedding

    axes = {name: {0: "texts", 1: "tokens"} for name in inputs} | {"sentence_embedding": {0: "texts"}}
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of every branch on a shape. The result is compared with torch afterwards.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Whole(),
            tuple(inputs.values()),
            path,
            dynamo=False,
            opset_version=_OPSET,
            input_names=list(inputs),
            output_names=["sentence_embedding"],
            dynamic_axes=axes,
        )


def _quantise(source: str, target: str) -> None:
    """Write int8 weights with dynamically quantised activations; figures are above."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = os.path.dirname(source)
    size = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    quantize_dynamic(
        source,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        use_external_data_format=size > _LARGE_BYTES,
    )


def _check(wanted: NDArray[np.float32], got: NDArray[np.float32], settings: HostSettings) -> None:
    """Raise ProviderMisconfigured if the prepared model's vectors differ too much."""
    import numpy as np

    norms = np.linalg.norm(wanted, axis=1) * np.linalg.norm(got, axis=1)
    cosine = float(np.mean(np.einsum("ij,ij->i", wanted, got) / np.maximum(norms, np.finfo(np.float32).tiny)))
    if not cosine >= _MIN_COSINE[settings.precision]:
        detail = f"The mean cosine between its vectors and those of the model in float32 is {cosine:.4f}."
        hint = (
            'Set the option "precision" to "float32".' if settings.precision == "int8" else 'Set "backend" to "torch".'
        )
        raise ProviderMisconfigured(
            f'model "{settings.model}" does not keep its vectors as ONNX in {settings.precision}',
            detail=detail,
            hint=hint,
        )


def main() -> None:
    settings = HostSettings(**json.loads(sys.argv[1]))
    # Libraries print to stdout, where only the answer may stand.
    answer, sys.stdout = sys.stdout, sys.stderr
    result: dict[str, Any]
    try:
        result = {"directory": prepare_here(settings)}
    except Exception as error:
        failure: ProviderError = load_error(settings, error)
        print(describe(error), file=sys.stderr)
        fields = {"message": failure.message, "detail": failure.detail, "hint": failure.hint}
        result = {"error": {"class": type(failure).__name__, **fields}}
    print(json.dumps(result), file=answer)


if __name__ == "__main__":
    main()
