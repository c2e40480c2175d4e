"""Run a model of towers: texts, images and recordings in one space, without torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from embedline.core.media import MediaPart, ModelInput, harmless_input
from embedline.errors import ProviderMisconfigured
from embedline.media.audio import samples
from embedline.media.images import cut, whole
from embedline.media.places import starts
from embedline.model_host.choice import choose_backend
from embedline.model_host.onnx_backend import OnnxBackend, open_session
from embedline.model_host.prepared import read_manifest
from embedline.model_host.static_backend import StaticBackend
from embedline.model_host.towers import AudioTower, ImageTower, Towers, read_towers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from tokenizers import Tokenizer

# Size at which the search for the best slice begins: 32 images, as which 12,800 characters of texts count.
_CHARACTERS = 12_800
# Most threads that decode. Each may hold an image of 400 MB, and the host has 4096 MB by default.
_DECODERS = 4
# Turns in which each thread decodes the files of a slice, so that all end at about the same time.
_TURNS = 2


class TowersBackend:
    """A model of towers that is ready for use."""

    slice_characters = _CHARACTERS

    def __init__(self, directory: str, device: str | None) -> None:
        towers = read_towers(directory)
        self.modalities = towers.modalities
        self._text = _text_backend(towers.text, device) if towers.text is not None else None
        self.max_tokens = self._text.max_tokens if self._text is not None else None
        self._rows = self._encoders(towers, device)
        for modality in self.modalities:
            width = self._rows[modality]([harmless_input((modality,), "warm up")]).shape[1]
            if width != towers.dimensions:
                raise ProviderMisconfigured(
                    f'the {modality} tower of "{directory}" returns {width} dimensions, not {towers.dimensions}',
                    hint="All towers of a model need vectors of the same space.",
                )

    def _encoders(
        self, towers: Towers, device: str | None
    ) -> dict[str, Callable[[Sequence[Any]], NDArray[np.float32]]]:
        """Return a function for each modality, from inputs to rows."""
        encoders: dict[str, Callable[[Sequence[Any]], NDArray[np.float32]]] = {}
        if self._text is not None:
            encoders["text"] = self._text.forward
        if towers.image is not None:
            encoders["image"] = _Images(towers.image, device).rows
        if towers.audio is not None:
            encoders["audio"] = _Recordings(towers.audio, device).rows
        return encoders

    def forward(self, texts: Sequence[ModelInput]) -> NDArray[np.float32]:
        """Return float32 rows of shape (len(texts), dimensions), not normalised.

        Raises InputRejected for a file that cannot be decoded.
        """
        import numpy as np

        kinds = [given.modality if isinstance(given, MediaPart) else "text" for given in texts]
        rows: NDArray[np.float32] | None = None
        for kind in dict.fromkeys(kinds):
            if kind not in self._rows:
                raise ProviderMisconfigured(f"the model has no {kind} tower")
            indexes = [index for index, other in enumerate(kinds) if other == kind]
            part = self._rows[kind]([texts[index] for index in indexes])
            if rows is None:
                rows = np.empty((len(texts), part.shape[1]), dtype="<f4")
            rows[indexes] = part
        assert rows is not None
        return rows

    def free_memory(self) -> None:
        """Do nothing, because onnxruntime's arena keeps its memory for the next pass."""

    def tokenizer(self) -> Tokenizer | None:
        """Return a copy of the text tower's tokenizer, None without one."""
        return None if self._text is None else self._text.tokenizer()


def _text_backend(folder: str, device: str | None) -> StaticBackend | OnnxBackend:
    if choose_backend(folder) == "static":
        return StaticBackend(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ProviderMisconfigured(
            f'the text tower in "{folder}" is neither a static model nor a prepared ONNX model',
            hint="Prepare it with embedline export-onnx, and name that directory.",
        )
    return OnnxBackend(folder, manifest, device)


class _Images:
    """An image tower: decodes beside each other, then runs the graph once."""

    def __init__(self, tower: ImageTower, device: str | None) -> None:
        import numpy as np

        self._tower = tower
        self._session = open_session(tower.graph, device)
        (self._input,) = [item.name for item in self._session.get_inputs()]
        # Of values from 0 to 255.
        self._scale = (1.0 / (255.0 * np.array(tower.std))).astype(np.float32)
        self._shift = (-np.array(tower.mean) / np.array(tower.std)).astype(np.float32)
        self._threads = min(_DECODERS, len(os.sched_getaffinity(0)))
        self._decoders = ThreadPoolExecutor(self._threads, thread_name_prefix="embedline-decoder")
        # The file whose segments came last, decoded: a large image has more segments than a slice takes.
        self._last: tuple[bytes, Image.Image] | None = None

    def rows(self, parts: Sequence[MediaPart]) -> NDArray[np.float32]:
        """Return a row for each segment."""
        import numpy as np

        pixels = np.empty((len(parts), 3, self._tower.size, self._tower.size), dtype=np.float32)
        # Segments of one file come one after the other.
        files = [list(group) for _, group in itertools.groupby(enumerate(parts), lambda item: id(item[1].data))]

        def decode(groups: Sequence[list[tuple[int, MediaPart]]]) -> None:
            for group in groups:
                image = self._image(group[0][1])
                for index, part in group:
                    values = np.asarray(_squared(cut(image, part), self._tower), dtype=np.float32)
                    pixels[index] = (values * self._scale + self._shift).transpose(2, 0, 1)

        if len(files) == 1:
            decode(files)
        else:
            # A thread takes some at once, because the change from one to another costs as much as a small image.
            size = -(-len(files) // (_TURNS * self._threads))
            list(self._decoders.map(decode, (files[start : start + size] for start in range(0, len(files), size))))
        (rows,) = self._session.run(None, {self._input: pixels})
        return np.asarray(rows, dtype="<f4")

    def _image(self, part: MediaPart) -> Image.Image:
        """Return the whole image of a segment."""
        last = self._last
        if last is not None and last[0] is part.data:
            return last[1]
        image = whole(part.data)
        is_whole = part.end == 0 or (part.start, part.end) == (0, image.width * image.height)
        self._last = None if is_whole else (part.data, image)
        return image


def _squared(image: Image.Image, tower: ImageTower) -> Image.Image:
    """Return an image as the square that a tower takes."""
    from PIL import Image, ImageOps

    size = (tower.size, tower.size)
    if tower.fit == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    if tower.fit == "pad":
        return ImageOps.pad(image, size, Image.Resampling.BICUBIC, color=(255, 255, 255))
    return image.resize(size, Image.Resampling.BICUBIC)


class _Recordings:
    """An audio tower."""

    def __init__(self, tower: AudioTower, device: str | None) -> None:
        self._tower = tower
        self._session = open_session(tower.graph, device)
        (self._input,) = [item.name for item in self._session.get_inputs()]

    def rows(self, parts: Sequence[MediaPart]) -> NDArray[np.float32]:
        """Return a row for each segment."""
        import numpy as np

        return np.stack([self._row(samples(part, self._tower.rate)) for part in parts])

    def _row(self, heard: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the mean of the vectors of all windows."""
        import numpy as np

        size = round(self._tower.window_seconds * self._tower.rate)
        shortest = round(self._tower.shortest_seconds * self._tower.rate)
        if len(heard) < shortest:
            heard = np.pad(heard, (0, shortest - len(heard)))
        windows = [heard[start : start + size] for start in starts(len(heard), size, 0)]
        rows = [self._session.run(None, {self._input: window[np.newaxis]})[0][0] for window in windows]
        mean: NDArray[np.float32] = np.mean(rows, axis=0, dtype=np.float32)
        return mean
