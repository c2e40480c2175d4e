"""Read towers.json, which names the parts of a model of texts and media.

Such a model puts texts, images and recordings into one space. It is a directory, whose file names the towers, each with
files of its own inside the directory:

    {"dimensions": 384,
     "towers": {
       "text":  {"folder": "text"},
       "image": {"graph": "image/model.onnx", "size": 48, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "fit": "pad"},
       "audio": {"graph": "audio/model.onnx", "rate": 16000, "window_seconds": 10, "shortest_seconds": 0.8}}}

The folder of a text tower holds a static model or a prepared ONNX model. All graphs take and return float32. That of an
image tower takes pixels of shape (images, 3, size, size). That of an audio tower takes samples between -1 and 1, of shape
(1, samples). The result has the shape (inputs, dimensions).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from embedline.errors import ProviderMisconfigured
from embedline.model_host.choice import TOWERS

# How an image becomes a square: white at its sides, its middle, or both sides stretched.
FITS = ("pad", "crop", "stretch")
_MODALITIES = ("text", "image", "audio")
# Pixels of the largest square of an image tower, and samples a second of the finest audio tower.
_MOST_PIXELS, _MOST_RATE = 4096, 384_000


@dataclass(frozen=True)
class ImageTower:
    """A graph over pixels; mean and deviation are of values from 0 to 1."""

    graph: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str


@dataclass(frozen=True)
class AudioTower:
    """A graph over samples.

    A recording is cut into windows, whose vectors are averaged. One shorter than the shortest is filled with silence.
    """

    graph: str
    rate: int
    window_seconds: float
    shortest_seconds: float


@dataclass(frozen=True)
class Towers:
    """The parts of a model; None for those that it does not have."""

    dimensions: int
    text: str | None
    image: ImageTower | None
    audio: AudioTower | None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Return what the model takes."""
        parts = zip(_MODALITIES, (self.text, self.image, self.audio), strict=True)
        return tuple(modality for modality, part in parts if part is not None)


def read_towers(directory: str) -> Towers:
    """Read and check the file; raise ProviderMisconfigured."""
    try:
        with open(os.path.join(directory, TOWERS), encoding="utf-8") as file:
            given = json.load(file)
        towers = given["towers"]
        unknown = sorted(towers.keys() - set(_MODALITIES))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        _refuse(directory, "is no JSON object with dimensions and towers")
    if unknown or not towers:
        _refuse(directory, f"has {unknown[0] if unknown else 'no'} tower", "Name text, image or audio.")
    fields = {name: _Fields(directory, name, entry) for name, entry in towers.items()}
    dimensions = given.get("dimensions")
    if type(dimensions) is not int or dimensions < 1:
        _refuse(directory, f"has dimensions {dimensions!r}", "Give the width of the vectors.")
    return Towers(
        dimensions,
        fields["text"].path("folder") if "text" in fields else None,
        _image_tower(fields["image"]) if "image" in fields else None,
        _audio_tower(fields["audio"]) if "audio" in fields else None,
    )


def _image_tower(fields: _Fields) -> ImageTower:
    fit = fields.entry.get("fit", FITS[0])
    if fit not in FITS:
        fields.refuse("fit", f"one of {', '.join(FITS)}")
    size = int(fields.number("size", 1, _MOST_PIXELS))
    return ImageTower(fields.path("graph"), size, fields.three("mean", -10), fields.three("std", 1e-6), fit)


def _audio_tower(fields: _Fields) -> AudioTower:
    window = fields.number("window_seconds", 0.01, 3600)
    shortest = fields.number("shortest_seconds", 0, window)
    return AudioTower(fields.path("graph"), int(fields.number("rate", 1000, _MOST_RATE)), window, shortest)


class _Fields:
    """The entry of one tower."""

    def __init__(self, directory: str, name: str, entry: object) -> None:
        self._directory, self._name = directory, name
        self.entry: Mapping[str, Any] = entry if isinstance(entry, dict) else {}

    def path(self, key: str) -> str:
        """Return the path of a file or folder, which lies inside the directory."""
        value = self.entry.get(key)
        if isinstance(value, str):
            root = os.path.realpath(self._directory)
            path = os.path.realpath(os.path.join(root, value))
            # The fingerprint is over the files of the directory, so no tower may lie elsewhere.
            if path.startswith(root + os.sep) and os.path.exists(path):
                return path
        self.refuse(key, "a path inside the model's directory")

    def number(self, key: str, low: float, high: float) -> float:
        """Return a number within its limits."""
        value = self.entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.refuse(key, f"a number between {low:g} and {high:g}")
        return value

    def three(self, key: str, low: float) -> tuple[float, ...]:
        """Return one number for each of red, green and blue."""
        values = self.entry.get(key)
        if not isinstance(values, list) or len(values) != 3 or not all(_is_number(value, low) for value in values):
            self.refuse(key, "three numbers, for red, green and blue")
        return tuple(map(float, values))

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Raise ProviderMisconfigured for the value of a key."""
        _refuse(self._directory, f"has {key} {self.entry.get(key)!r} in tower {self._name}", f"Give {wanted}.")


def _is_number(value: object, low: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= 10


def _refuse(directory: str, fault: str, hint: str | None = None) -> NoReturn:
    raise ProviderMisconfigured(f'{TOWERS} of the model in "{directory}" {fault}', hint=hint)
