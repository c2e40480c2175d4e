"""The folder of a run: what a killed one has done already."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedline.client.training.examples import Example, examples_hash, read_examples, write_examples
from embedline.core.statistics import FloatArray
from embedline.errors import InsufficientDisk, InvalidParameter, NotPermitted, NotReady

_ENOSPC, _EDQUOT = 28, 122


class RunFolder:
    """The folder `NAME.training` beside the model.

    It holds the request, the examples, the scores of the base and the checkpoints.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Return the place where the trained model is put together."""
        return self.path / "model"

    @property
    def _examples(self) -> Path:
        return self.path / "examples.jsonl.gz"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out; raise NotReady if one is under way.

        An error of the disk is raised in words.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise disk_error(self.path, error) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise NotReady(
                    f"another run is training in {self.path}", hint="Wait for it, or train under another --name."
                ) from None
            yield
        except OSError as error:
            raise disk_error(self.path, error) from None
        finally:
            os.close(descriptor)

    def begin(self, request: dict[str, Any], *, restart: bool) -> bool:
        """Note the request; return True if an unfinished run had the same."""
        path = self.path / "run.json"
        if restart:
            self.clear()
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self.clear()
            _write(path, json.dumps(request, indent=2, sort_keys=True))
            return False
        different = sorted(name for name in {**earlier, **request} if earlier.get(name) != request.get(name))
        if different:
            raise InvalidParameter(
                f"an unfinished run in {self.path} had other {', '.join(different)}",
                hint="Give the same options to go on with it, or --restart to begin again.",
            )
        return True

    def clear(self) -> None:
        """Remove what a run has left, but not the folder, which is held."""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remember(self, examples: list[Example], corpus_hash: str, before: FloatArray) -> None:
        """Keep what a resumed run would have to make again."""
        write_examples(self._examples, examples)
        _write(self.path / "before.json", json.dumps({"corpus": corpus_hash, "scores": before.tolist()}))

    def examples(self) -> list[Example] | None:
        """Return the examples of the run, None if it had none yet."""
        return read_examples(self._examples)

    def before(self, corpus_hash: str) -> FloatArray | None:
        """Return the scores of the base over this corpus, None if none are kept."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            kept = json.loads((self.path / "before.json").read_text(encoding="utf-8"))
            if kept["corpus"] == corpus_hash:
                return np.array(kept["scores"], dtype=np.float64)
        return None

    def result(self) -> dict[str, Any] | None:
        """Return the lineage of a model that is trained and not registered yet."""
        try:
            found: dict[str, Any] = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def keep_result(self, lineage: dict[str, Any]) -> None:
        """Note that the model is trained; what is left is to register it."""
        _write(self.path / "result.json", json.dumps(lineage))

    def place(self, target: Path) -> None:
        """Put the trained model into its place, unless it is there."""
        if self.model.exists():
            self.model.rename(target)

    def clean(self) -> None:
        """Remove all but the examples."""
        for path in self.path.iterdir():
            if path != self._examples:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def kept_examples(target: Path, digest: str) -> list[Example] | None:
    """Return the examples that a model was trained on, if they are still beside it."""
    found = RunFolder(run_path(target)).examples()
    return found if found is not None and examples_hash(found) == digest else None


def run_path(target: Path) -> Path:
    """Return the folder of the run that makes a model."""
    return target.with_name(f"{target.name}.training")


def disk_error(path: Path, error: OSError) -> Exception:
    """Return an error of the disk in words; any other as it is."""
    if error.errno in (_ENOSPC, _EDQUOT):
        return InsufficientDisk(
            f"the disk of {path} is full, or its quota is used up",
            hint="Make room and run the same command again, or name another directory with --output.",
        )
    if isinstance(error, PermissionError):
        return NotPermitted(f"this user may not write into {path.parent}", hint="Name another directory with --output.")
    return error


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
