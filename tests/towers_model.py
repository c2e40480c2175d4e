"""A model of three towers and three dimensions.

It needs no torch and is made in a moment. An image becomes the mean of its red, green and blue, a recording its mean, mean
size and largest value. Texts have the first three dimensions of static-256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from embedline.dev.cluster.models import cut_static_model
from support import MODELS

DIMENSIONS = 3
IMAGE: Mapping[str, Any] = {
    "graph": "image/model.onnx", "size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "fit": "pad",
}  # fmt: skip
AUDIO: Mapping[str, Any] = {
    "graph": "audio/model.onnx", "rate": 8000, "window_seconds": 1, "shortest_seconds": 0.5,
}  # fmt: skip
HEARD = ("mean", "mean_size", "most")


def make_towers_model(
    folder: Path, *modalities: str, dimensions: int = DIMENSIONS, heard: Sequence[str] = HEARD
) -> Path:
    """Write the model with these towers, all if none is named; return its folder.

    `heard` are the values of HEARD in the order that the tower of recordings gives them.
    """
    folder.mkdir(mode=0o755, exist_ok=True)
    wanted = modalities or ("text", "image", "audio")
    towers: dict[str, Any] = {}
    if "text" in wanted:
        cut_static_model(MODELS / "static-256", DIMENSIONS, folder / "text")
        towers["text"] = {"folder": "text"}
    if "image" in wanted:
        _save(
            folder / "image",
            ["images", 3, 8, 8],
            [helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)],
        )
        towers["image"] = IMAGE
    if "audio" in wanted:
        nodes = [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1]),
            helper.make_node("Abs", ["x"], ["size"]),
            helper.make_node("ReduceMean", ["size"], ["mean_size"], axes=[1]),
            helper.make_node("ReduceMax", ["x"], ["most"], axes=[1]),
            helper.make_node("Concat", list(heard), ["y"], axis=1),
        ]
        _save(folder / "audio", [1, "samples"], nodes)
        towers["audio"] = AUDIO
    write_towers(folder, towers, dimensions)
    return folder


def write_towers(folder: Path, towers: object, dimensions: object = DIMENSIONS) -> None:
    """Write the file that names the towers."""
    (folder / "towers.json").write_text(json.dumps({"dimensions": dimensions, "towers": towers}))


def _save(folder: Path, shape: list[Any], nodes: list[Any]) -> None:
    folder.mkdir(exist_ok=True)
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], DIMENSIONS])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(folder / "model.onnx")
    )
