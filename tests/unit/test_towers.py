"""A model of towers gives each input to its own tower, and is one model."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedline.chunking.spec import chunking_spec
from embedline.core.embedding import ModelConfig
from embedline.core.media import MediaPart
from embedline.embedders.local import LocalEmbedder
from embedline.errors import InputRejected, InvalidParameter, ProviderMisconfigured
from embedline.media.images import segments
from embedline.model_host import towers_backend
from embedline.model_host.choice import choose_backend
from embedline.model_host.host_settings import HostSettings, settings_of
from embedline.model_host.towers_backend import TowersBackend
from embedline.model_host.weights import weights_identity
from media_files import encoded, recorded, tone
from support import MODELS
from towers_model import AUDIO, IMAGE, make_towers_model, write_towers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_towers_model(tmp_path_factory.mktemp("towers") / "model")


@pytest.fixture(scope="module")
def backend(folder: Path) -> TowersBackend:
    return TowersBackend(str(folder), "cpu")


def _image(colour: tuple[int, int, int], size: tuple[int, int] = (20, 20)) -> MediaPart:
    return MediaPart("image", encoded(Image.new("RGB", size, colour), "PNG"))


def _recording(samples: np.ndarray, rate: int = 8000) -> MediaPart:
    return MediaPart("audio", recorded(samples, rate))


def test_each_input_is_read_by_its_own_tower(backend: TowersBackend) -> None:
    assert backend.modalities == ("text", "image", "audio")
    inputs = ["a text", _image((255, 0, 0)), _recording(np.full(8000, 0.5, np.float32)), "another", _image((0, 0, 255))]
    rows = backend.forward(inputs)
    assert rows.dtype == np.float32 and rows.shape == (5, 3)
    np.testing.assert_allclose(rows[[1, 4]], [[1, 0, 0], [0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(rows[2], [0.5, 0.5, 0.5], atol=1e-3)
    np.testing.assert_array_equal(rows[[0, 3]], backend.forward(["a text", "another"]))
    assert backend.tokenizer() is not None and backend.max_tokens is None


def test_each_segment_has_the_vector_that_it_has_alone(backend: TowersBackend) -> None:
    rng = np.random.default_rng(1)
    images = [_image(tuple(rng.integers(0, 256, 3).tolist()), (int(side), 30)) for side in rng.integers(1, 200, 40)]
    together = backend.forward(images)
    np.testing.assert_allclose(together, [backend.forward([image])[0] for image in images], atol=1e-6)


# White at the sides is half of the square, and a quarter of the image is white itself.
@pytest.mark.parametrize(("fit", "white"), [("pad", 0.625), ("crop", 0.0), ("stretch", 0.25)])
def test_an_image_becomes_a_square_as_the_model_says(tmp_path: Path, fit: str, white: float) -> None:
    folder = make_towers_model(tmp_path / "model", "image")
    write_towers(folder, {"image": {**IMAGE, "fit": fit, "mean": [0, 0.5, 0], "std": [1, 0.5, 1]}})
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 16))
    row = TowersBackend(str(folder), "cpu").forward([MediaPart("image", encoded(image, "PNG"))])[0]
    assert row[0] == pytest.approx(white, abs=0.06)
    assert row[1] == pytest.approx((row[0] - 0.5) / 0.5, abs=1e-4)


def test_a_file_is_decoded_once_for_all_of_its_tiles(backend: TowersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    whole = towers_backend.whole
    monkeypatch.setattr(towers_backend, "whole", lambda data: decoded.append(len(data)) or whole(data))
    image = Image.new("RGB", (128, 64), (255, 0, 0))
    image.paste((0, 0, 255), (64, 0, 128, 64))
    data = encoded(image, "PNG")
    places = segments(data, chunking_spec("tiles", None, None, {"tile_pixels": 64, "tile_overlap": 0}, "image"))
    parts = [MediaPart("image", data, *place) for place in places]
    # Also if a slice ends between them.
    rows = np.concatenate([backend.forward(parts[:1]), backend.forward(parts[1:])])
    np.testing.assert_allclose(rows, [[1, 0, 0], [0, 0, 1]], atol=1e-6)
    assert len(decoded) == 1
    backend.forward([_image((1, 2, 3)), _image((3, 2, 1))])
    assert len(decoded) == 3


def test_a_recording_is_the_mean_of_its_windows(backend: TowersBackend) -> None:
    loud, quiet = np.full(8000, 0.8, np.float32), np.full(8000, 0.2, np.float32)
    rows = backend.forward(
        [_recording(np.concatenate([loud, quiet])), _recording(loud[:4000]), _recording(loud[:2000])]
    )
    np.testing.assert_allclose(rows[0], [0.5, 0.5, 0.5], atol=1e-3)
    np.testing.assert_allclose(rows[1], [0.8, 0.8, 0.8], atol=1e-3)
    # Filled with silence up to half a second.
    np.testing.assert_allclose(rows[2], [0.4, 0.4, 0.8], atol=1e-3)
    part = MediaPart("audio", recorded(np.concatenate([loud, quiet]), 8000), 1000, 2000)
    np.testing.assert_allclose(backend.forward([part])[0], [0.2, 0.2, 0.2], atol=1e-3)


@pytest.mark.parametrize("part", [MediaPart("image", b"GIF89a"), MediaPart("audio", b"fLaC"), MediaPart("image", b"")])
def test_a_file_that_cannot_be_decoded_is_rejected(backend: TowersBackend, part: MediaPart) -> None:
    with pytest.raises(InputRejected, match=r"^the (image|recording) "):
        backend.forward([_image((0, 0, 0)), part])


def test_a_model_without_a_tower_says_so(tmp_path: Path) -> None:
    backend = TowersBackend(str(make_towers_model(tmp_path / "model", "audio")), "cpu")
    assert (backend.modalities, backend.tokenizer(), backend.max_tokens) == (("audio",), None, None)
    with pytest.raises(ProviderMisconfigured, match="no text tower"):
        backend.forward(["a text"])


@pytest.mark.parametrize(
    ("towers", "dimensions", "reason"),
    [
        ({}, 3, "has no tower"),
        ({"smell": {}}, 3, "has smell tower"),
        (["image"], 3, "is no JSON object"),
        ({"image": IMAGE}, "3", "has dimensions '3'"),
        ({"image": IMAGE}, 4, "returns 3 dimensions, not 4"),
        ({"image": {**IMAGE, "graph": "../other/model.onnx"}}, 3, "has graph '../other/model.onnx'"),
        ({"image": {**IMAGE, "graph": "/etc/passwd"}}, 3, "has graph '/etc/passwd'"),
        ({"image": {**IMAGE, "graph": "link.onnx"}}, 3, "has graph 'link.onnx'"),
        ({"image": {**IMAGE, "graph": "nothing.onnx"}}, 3, "has graph 'nothing.onnx'"),
        ({"image": {**IMAGE, "size": 0}}, 3, "has size 0 in tower image"),
        ({"image": {**IMAGE, "mean": [0, 0]}}, 3, "has mean"),
        ({"image": {**IMAGE, "std": [0, 1, 1]}}, 3, "has std"),
        ({"image": {**IMAGE, "fit": "turn"}}, 3, "has fit 'turn'"),
        ({"image": "model.onnx"}, 3, "has size None"),
        ({"audio": {**AUDIO, "rate": True}}, 3, "has rate True"),
        ({"audio": {**AUDIO, "shortest_seconds": 2}}, 3, "has shortest_seconds 2"),
        ({"text": {"folder": "image"}}, 3, "neither a static model nor a prepared"),
    ],
)
def test_a_fault_of_the_file_is_named(tmp_path: Path, towers: Any, dimensions: Any, reason: str) -> None:
    folder = make_towers_model(tmp_path / "model", "image", "audio")
    other = make_towers_model(tmp_path / "other", "image")
    (folder / "link.onnx").symlink_to(other / "image" / "model.onnx")
    write_towers(folder, towers, dimensions)
    with pytest.raises(ProviderMisconfigured) as caught:
        TowersBackend(str(folder), "cpu")
    assert reason in caught.value.message


def test_a_change_of_any_file_is_another_model(tmp_path: Path) -> None:
    folder = make_towers_model(tmp_path / "model")
    settings = HostSettings(str(folder), backend=choose_backend(str(folder)))
    assert settings.backend == "towers"
    known = {weights_identity(settings)}
    assert known == {weights_identity(settings)}
    for name in (
        "towers.json",
        "image/model.onnx",
        "audio/model.onnx",
        "text/model.safetensors",
        "text/tokenizer.json",
    ):
        with (folder / name).open("ab") as file:
            file.write(b" ")
        identity = weights_identity(settings)
        assert identity not in known, name
        known.add(identity)


def test_the_option_backend_is_refused(folder: Path) -> None:
    assert settings_of(ModelConfig("towers", "sentence-transformers", str(folder))).backend == "towers"
    with pytest.raises(InvalidParameter, match="its towers name their own files"):
        settings_of(ModelConfig("towers", "sentence-transformers", str(folder), options={"backend": "onnx"}))


def test_a_model_host_serves_all_towers(folder: Path) -> None:
    config = ModelConfig("towers", "sentence-transformers", str(folder))
    with tempfile.TemporaryDirectory(prefix="el-") as root, subprocess.Popen(["sleep", "600"]) as owner:
        embedder = LocalEmbedder(config, owner_pid=owner.pid, runtime_root=root)
        inputs = [_image((255, 0, 0)), MediaPart("image", b"no image"), _recording(np.full(8000, 0.5, np.float32))]
        block = embedder.submit(inputs, "document").result(60)
        rows = np.frombuffer(block.data, dtype="<f4").reshape(block.count, 3)
        np.testing.assert_allclose(rows[[0, 2]], [[1, 0, 0], [0.5, 0.5, 0.5]], atol=1e-3)
        assert np.isnan(rows[1]).all()
        text = embedder.submit(["a text"], "query").result(60)
        assert (text.count, text.dimensions) == (1, 3)
        embedder.close()
        owner.kill()


def test_a_sound_is_nearest_to_itself_when_it_is_quieter_and_cut() -> None:
    backend = TowersBackend(str(MODELS / "speech"), "cpu")
    assert backend.modalities == ("audio",)
    rng = np.random.default_rng(4)
    seconds = np.arange(32_000) / 16_000
    sounds = [
        tone(2, hertz=300),
        tone(2, hertz=2000),
        (0.3 * rng.normal(size=32_000)).astype(np.float32),
        (0.5 * np.sin(2 * np.pi * (100 + 900 * seconds) * seconds)).astype(np.float32),
        (0.5 * np.sin(2 * np.pi * 700 * seconds) * (np.sin(8 * np.pi * seconds) > 0)).astype(np.float32),
    ]

    def rows(heard: list[np.ndarray]) -> np.ndarray:
        found = backend.forward([_recording(sound, 16_000) for sound in heard])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    nearest = (rows([0.3 * sound[4000:24_000] for sound in sounds]) @ rows(sounds).T).argmax(axis=1)
    assert nearest.tolist() == list(range(len(sounds)))
    assert backend.forward([_recording(np.zeros(1, np.float32), 16_000)]).shape == (1, 96)
