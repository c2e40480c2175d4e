"""Train an image tower beside a text model that stays as it is.

The vectors of names are those of all-MiniLM-L6-v2. A small convolutional network learns to put each picture beside its
name, by the symmetric loss of CLIP (Radford et al. 2021, section 2.3). Needs torch, which only this module uses: the
network is written as an ONNX graph.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedline.dev.cluster.models import replace_folder
from embedline.dev.demo.emoji import Emoji
from embedline.model_host.choice import TOWERS
from embedline.model_host.onnx_backend import OnnxBackend
from embedline.model_host.prepared import GRAPH, read_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Grey on which the values of red, green and blue are centred; pictures of emoji are bright.
_MEAN, _STD = [0.8, 0.75, 0.7], [0.3, 0.33, 0.35]
_BATCH = 128
_RATE, _DECAY = 4e-3, 0.05
# First and largest factor of the cosines, as with CLIP.
_FIRST_SCALE, _MOST_SCALE = 1 / 0.07, 100.0
# How much each picture is turned (radians), scaled and moved (of its half side), at most, each time it is seen.
_TURN, _ZOOM, _SHIFT = 0.2, 0.15, 0.1


@dataclass(frozen=True)
class Recipe:
    """An image tower and its training.

    `channels` are those of each convolution, which halves the sides; `size` is the side of the square that is seen.
    """

    channels: tuple[int, ...] = (32, 64, 128, 192)
    size: int = 48
    epochs: int = 40
    seed: int = 1


def train(emoji: Sequence[Emoji], seen: Sequence[int], text_folder: Path, folder: Path, recipe: Recipe) -> None:
    """Train with the emoji at the places `seen`, and write the model of both towers.

    `text_folder` is a prepared ONNX model. The same recipe gives the same files on the same machine.
    """
    texts = _text_vectors(text_folder, [emoji[place].name for place in seen])
    pixels = _pixels([emoji[place] for place in seen], recipe.size)
    weights = _trained(texts, pixels, recipe)
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="training-", dir=folder.parent) as name:
        made = Path(name) / "model"
        # A link to each file: the text tower takes 90 MB.
        shutil.copytree(text_folder, made / "text", copy_function=os.link)
        (made / "image").mkdir()
        write_graph(weights, recipe.size, made / "image" / GRAPH)
        image = {"graph": f"image/{GRAPH}", "size": recipe.size, "mean": _MEAN, "std": _STD, "fit": "pad"}
        towers = {"text": {"folder": "text"}, "image": image}
        description = {"dimensions": texts.shape[1], "towers": towers, "recipe": dataclasses.asdict(recipe)}
        (made / TOWERS).write_text(json.dumps(description, indent=2) + "\n")
        replace_folder(folder, made)


def trained_with(folder: Path) -> Recipe | None:
    """Return the recipe of a model that was trained here, None without one."""
    try:
        given = json.loads((folder / TOWERS).read_text())["recipe"]
        return Recipe(**{**given, "channels": tuple(given["channels"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _text_vectors(folder: Path, names: list[str]) -> NDArray[np.float32]:
    import numpy as np

    manifest = read_manifest(str(folder))
    assert manifest is not None
    rows = OnnxBackend(str(folder), manifest, "cpu").forward(names)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _pixels(emoji: Sequence[Emoji], size: int) -> NDArray[np.float32]:
    """Return the pictures as the image tower sees them.

    Their shape is (pictures, 3, size, size).
    """
    import numpy as np
    from PIL import Image

    pictures = [np.asarray(one.picture.resize((size, size), Image.Resampling.BICUBIC)) for one in emoji]
    values = np.stack(pictures).astype(np.float32) / 255
    normal = (values - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


Layer = tuple["NDArray[np.float32]", "NDArray[np.float32]"]


def _trained(texts: NDArray[np.float32], pixels: NDArray[np.float32], recipe: Recipe) -> list[Layer]:
    """Return the weights and biases of each convolution and of the last, linear layer."""
    import torch
    from torch.nn import functional

    threads = torch.get_num_threads()
    # One thread is faster than two with so small a network, and has the same result each time.
    torch.set_num_threads(1)
    try:
        torch.manual_seed(recipe.seed)
        network = _network(recipe.channels, texts.shape[1])
        scale = torch.nn.Parameter(torch.tensor(_FIRST_SCALE).log())
        optimiser = torch.optim.AdamW([*network.parameters(), scale], weight_decay=_DECAY)
        all_texts, all_pixels = torch.from_numpy(texts), torch.from_numpy(pixels)
        steps = recipe.epochs * -(-len(texts) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps)
        network.train()
        for _ in range(recipe.epochs):
            for places in torch.randperm(len(texts)).split(_BATCH):
                images = functional.normalize(network(_moved(all_pixels[places])), dim=1)
                logits = images @ all_texts[places].T * scale.exp()
                right = torch.arange(len(places))
                loss = functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                with torch.no_grad():
                    scale.clamp_(max=torch.tensor(_MOST_SCALE).log())
        return _folded(network.eval())
    finally:
        torch.set_num_threads(threads)


def _network(channels: Sequence[int], dimensions: int) -> Any:
    from torch import nn

    layers: list[Any] = []
    for before, after in zip((3, *channels), channels, strict=False):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], dimensions))


def _moved(pixels: Any) -> Any:
    """Return pictures a little turned, scaled and moved, each otherwise."""
    import torch
    from torch.nn import functional

    turn = _TURN * (2 * torch.rand(len(pixels)) - 1)
    zoom = 1 + _ZOOM * (2 * torch.rand(len(pixels)) - 1)
    places = torch.zeros(len(pixels), 2, 3)
    places[:, 0, 0] = places[:, 1, 1] = zoom * turn.cos()
    places[:, 1, 0] = zoom * turn.sin()
    places[:, 0, 1] = -places[:, 1, 0]
    places[:, :, 2] = _SHIFT * (2 * torch.rand(len(pixels), 2) - 1)
    grid = functional.affine_grid(places, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _folded(network: Any) -> list[Layer]:
    """Return the layers with each normalisation folded into its convolution."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    modules = list(network)
    layers = [fuse_conv_bn_eval(first, second) for first, second in itertools.pairwise(modules)
              if isinstance(first, nn.Conv2d)]  # fmt: skip
    return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in [*layers, modules[-1]]]


def write_graph(layers: Sequence[Layer], size: int, path: Path) -> None:
    """Write layers as the graph of an image tower.

    All but the last are convolutions; each has weight and bias.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []
    *convolutions, (last, bias) = layers
    name = "pixels"
    for number, weights in enumerate(convolutions):
        names = [f"weight{number}", f"bias{number}"]
        constants += [numpy_helper.from_array(values, key) for values, key in zip(weights, names, strict=True)]
        nodes.append(helper.make_node("Conv", [name, *names], [f"sum{number}"], strides=[2, 2], pads=[1, 1, 1, 1]))
        name = f"layer{number}"
        nodes.append(helper.make_node("Relu", [f"sum{number}"], [name]))
    constants += [numpy_helper.from_array(last, "weight"), numpy_helper.from_array(bias, "bias")]
    nodes.append(helper.make_node("ReduceMean", [name], ["mean"], axes=[2, 3], keepdims=0))
    nodes.append(helper.make_node("Gemm", ["mean", "weight", "bias"], ["embedding"], transB=1))
    graph = helper.make_graph(
        nodes,
        "image",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["images", 3, size, size])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["images", len(bias)])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
