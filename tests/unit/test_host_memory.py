"""The memory of a host with an accelerator: what it uses counts, what a driver maps does not."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedline.core.embedding import ModelConfig
from embedline.model_host.host_settings import HostSettings, settings_of
from embedline.model_host.inference import LoadedModel
from embedline.model_host.place import Owner, prepare_place
from injected_host import embedder_of, injected_host
from support import wait_until

_LIMIT_MB = 300
# Linux's flag, which Python's mmap names from 3.13 on.
_NORESERVE = 0x4000
# Kept for as long as the host runs.
_mapped: list[Any] = []


class Hungry:
    """A model that takes as many MB of memory as its text says."""

    slice_characters = 1024
    modalities = ("text",)
    max_tokens = None

    def forward(self, texts: Sequence[str]) -> NDArray[np.float32]:
        _mapped.extend(np.ones(int(text) << 17) for text in texts if text.isdecimal())
        return np.ones((len(texts), 2), dtype=np.float32)

    def free_memory(self) -> None:
        """Nothing is freed."""

    def tokenizer(self) -> None:
        """It has none."""


def load(settings: HostSettings) -> LoadedModel:
    """Map memory as CUDA's driver does: 64 GB of addresses without memory, and shared memory that is used."""
    private = mmap.mmap(-1, 64 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    shared = mmap.mmap(-1, (_LIMIT_MB + 50) << 20)
    for _ in range(len(shared) >> 20):
        shared.write(b"x" * (1 << 20))
    _mapped.extend((private, shared))
    return LoadedModel(settings, Hungry())


def test_a_host_with_an_accelerator_is_limited_by_the_memory_that_it_uses() -> None:
    settings = HostSettings("/hungry", device="cuda", memory_limit_mb=_LIMIT_MB)
    with tempfile.TemporaryDirectory(prefix="el-") as root, injected_host(__file__, "load", settings, root) as host:
        embedder = embedder_of(settings, root, os.getpid())
        embedder.submit(["words", "10"], "document").result(60)
        assert mapped_mb(host.pid) > 64 << 10
        # It may be answered before the memory is checked, or fail for want of another host with such a model.
        embedder.submit([str(_LIMIT_MB)], "document")
        wait_until(lambda: host.poll() is not None, 30, "the host ends")
        embedder.close()
        assert host.returncode == 1
        log = prepare_place(settings, Owner.of(os.getpid()), root).log
        # The log of an earlier host is kept when another one starts.
        words = [Path(path).read_text() for path in (log, f"{log}.old") if os.path.exists(path)]
        assert f"memory_limit_mb is {_LIMIT_MB}" in "".join(words)


def mapped_mb(pid: int) -> int:
    """Return what the kernel's limit on data would count."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmData"].split()[0]) >> 10


@pytest.mark.parametrize(
    ("options", "drivers", "expected"),
    [
        ({}, [], ("float32", False)),
        ({}, ["nvidiactl"], ("auto", True)),
        ({"precision": "auto"}, ["nvidiactl"], ("auto", True)),
        ({"precision": "float32"}, ["nvidiactl"], ("float32", True)),
        ({"precision": "float16"}, [], ("float16", False)),
        ({"device": "cpu"}, ["nvidiactl"], ("float32", False)),
        ({"device": "cuda:1"}, [], ("auto", True)),
        ({"backend": "onnx"}, ["nvidiactl"], ("float32", True)),
    ],
)
def test_a_machine_with_an_accelerator_leaves_the_precision_to_the_host(
    options: dict[str, Any],
    drivers: list[str],
    expected: tuple[str, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for driver in drivers:
        (tmp_path / driver).touch()
    monkeypatch.setattr("embedline.model_host.host_settings._DRIVERS", (str(tmp_path / "nvidiactl"),))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": ""}]))
    config = ModelConfig("m", "sentence-transformers", str(tmp_path / "model"), options=options)
    settings = settings_of(config)
    assert (settings.precision, settings.may_use_accelerator) == expected
