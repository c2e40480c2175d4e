"""Training puts pictures beside their names, in the same way each time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from embedline.core.media import MediaPart
from embedline.dev.demo.emoji import HELD_OUT, Emoji, split
from embedline.dev.demo.joint_space import Recipe, train
from embedline.model_host.towers_backend import TowersBackend
from support import MODELS

_COLOURS = ("red", "green", "blue", "yellow", "black", "purple")
_SHAPES = ("circle", "square", "line", "triangle")


def _picture(colour: str, shape: str) -> Emoji:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((8, 8, 56, 56), fill=colour)
    elif shape == "square":
        draw.rectangle((12, 12, 52, 52), fill=colour)
    elif shape == "line":
        draw.line((4, 32, 60, 32), fill=colour, width=8)
    else:
        draw.polygon([(32, 8), (60, 56), (4, 56)], fill=colour)
    return Emoji(f"{colour} {shape}", image)


def _file(emoji: Emoji) -> bytes:
    file = io.BytesIO()
    emoji.picture.save(file, "PNG")
    return file.getvalue()


@pytest.mark.torch
def test_pictures_find_their_names(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pictures = [_picture(colour, shape) for colour in _COLOURS for shape in _SHAPES]
    recipe = Recipe(channels=(8, 16), size=16, epochs=150)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        train(pictures, range(len(pictures)), MODELS / "minilm", folder, recipe)
    assert (first / "image/model.onnx").read_bytes() == (second / "image/model.onnx").read_bytes()
    backend = TowersBackend(str(first), "cpu")
    assert backend.modalities == ("text", "image")
    rows = backend.forward([MediaPart("image", _file(one)) for one in pictures])
    names = backend.forward([one.name for one in pictures])
    nearest = (names @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T).argmax(axis=1)
    # By chance it would be one of 24.
    assert np.mean(nearest == np.arange(len(pictures))) > 0.7


def test_the_same_emoji_are_held_out_each_time() -> None:
    seen, held_out = split(1000)
    assert (seen, held_out) == split(1000)
    assert len(held_out) == HELD_OUT and sorted([*seen, *held_out]) == list(range(1000))
