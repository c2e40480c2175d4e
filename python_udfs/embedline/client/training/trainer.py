"""Train a sentence-transformers model on examples; a killed run can go on."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedline.client.training.examples import Example, same_width
from embedline.client.training.measuring import Matrix
from embedline.client.training.request import LIBRARIES, Parameters
from embedline.errors import InsufficientDisk, NotReady
from embedline.model_host.choice import choose_backend
from embedline.model_host.host_settings import HostSettings
from embedline.model_host.prepared import read_manifest
from embedline.model_host.weights import weights_identity

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Report = Callable[[int, int], None]
# Factor on cosines before the softmax, as the library sets it: a temperature of 0.05.
_SCALE = 20.0
_WARMUP = 0.1
# Checkpoints of a run, the last of which are kept.
_CHECKPOINTS, _KEPT = 10, 2
# Texts that a transformer holds at a time while it computes the loss of a batch; fewer take less memory, and nothing else
# changes.
_MINI_BATCH = 32
_ENCODED = 512
# What the optimizer keeps of each weight.
_MOMENTS = 2
# Bytes of a checkpoint beside these: its state and its card.
_REST = 200_000
# What a checkpoint holds once it is whole, besides the weights.
_PARTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
_DISK_WORDS = ("no space left", "disk quota", "file too large", "pytorchstreamwriter", "unexpected pos")


@dataclass(frozen=True)
class Base:
    """The model that is trained further, where it lies, and the prefixes of its texts."""

    name: str
    model: str
    revision: str | None
    fingerprint: str
    query_prefix: str
    document_prefix: str

    @property
    def is_static(self) -> bool:
        """Return True for a table of token vectors."""
        return choose_backend(self.model) == "static"

    def require_trainable(self) -> None:
        """Raise NotReady if there are no weights that torch could train."""
        if os.path.isabs(self.model) and not os.path.isdir(self.model):
            raise NotReady(
                f'the directory of model "{self.name}" is not on this machine: {self.model}',
                hint="Train on the server, or copy the directory to the same path here.",
            )
        if os.path.isdir(self.model) and read_manifest(self.model) is not None:
            raise NotReady(
                f'model "{self.name}" is a graph prepared for onnxruntime, which cannot be trained',
                hint="Register the model that the graph was made of, and name it with --base: SELECT"
                " embedline.create_model('NAME', 'sentence-transformers', 'DIRECTORY OR HUB NAME');",
            )


@dataclass
class Trainee:
    """A loaded model with the identity that its weights had."""

    model: SentenceTransformer
    base: Base
    weights: str

    @classmethod
    def load(cls, base: Base, device: str | None) -> Trainee:
        """Load the base; raise NotReady or ProviderError."""
        from embedline.model_host.torch_backend import load_torch

        _quiet()
        settings = HostSettings(model=base.model, revision=base.revision, device=device)
        return cls(load_torch(settings).model, base, weights_identity(settings))

    def encode(self, texts: Sequence[str], prefix: str, report: Report) -> Matrix:
        """Return the vectors of texts, each of length 1."""
        from embedline.client.training.measuring import unit

        parts = []
        for start in range(0, len(texts), _ENCODED):
            report(start, len(texts))
            block = [prefix + text for text in texts[start : start + _ENCODED]]
            rows = self.model.encode(block, prompt="", batch_size=_MINI_BATCH, show_progress_bar=False)
            parts.append(np.asarray(rows, dtype=np.float32))
        report(len(texts), len(texts))
        return unit(np.concatenate(parts))

    def train(
        self, examples: Sequence[Example], parameters: Parameters, seed: int, folder: Path, report: Report
    ) -> int | None:
        """Train from the last whole checkpoint on; return its step, None without one."""
        _deterministic()
        trainer = self._trainer(examples, parameters, seed, folder)
        trainer.add_callback(_progress(report))
        last = _last_checkpoint(folder)
        with_disk(folder, lambda: trainer.train(resume_from_checkpoint=str(last) if last else None))
        return None if last is None else int(last.name.rpartition("-")[2])

    def _trainer(self, examples: Sequence[Example], parameters: Parameters, seed: int, folder: Path) -> Any:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from sentence_transformers.sentence_transformer import losses
        from transformers import PrinterCallback

        width = same_width(examples)
        columns = {
            "query": [self.base.query_prefix + example.query for example in examples],
            "positive": [self.base.document_prefix + example.positive for example in examples],
        } | {
            f"negative_{place}": [self.base.document_prefix + example.negatives[place] for example in examples]
            for place in range(width)
        }  # fmt: skip
        batches = -(-len(examples) // parameters.batch_size)
        steps = batches * parameters.epochs
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(folder), num_train_epochs=parameters.epochs, learning_rate=parameters.learning_rate,
            per_device_train_batch_size=parameters.batch_size, warmup_steps=max(1, round(steps * _WARMUP)),
            seed=seed % 2**32, data_seed=seed % 2**32, batch_sampler="no_duplicates", save_strategy="steps",
            save_steps=max(1, steps // _CHECKPOINTS), save_total_limit=_KEPT, report_to="none",
            logging_strategy="no", disable_tqdm=True, use_cpu=self.model.device.type == "cpu",
            dataloader_pin_memory=False,
        )  # fmt: skip
        if self.base.is_static:
            # The cached form computes the same loss in less memory, and cannot compute it for a table.
            loss: Any = losses.MultipleNegativesRankingLoss(self.model, scale=_SCALE)
        else:
            loss = losses.CachedMultipleNegativesRankingLoss(self.model, scale=_SCALE, mini_batch_size=_MINI_BATCH)

        class Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
            """Train without a card, which would show texts of the rows as examples."""

            def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
                """Collect nothing for a card."""

        trainer = Trainer(model=self.model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def save(self, folder: Path) -> str:
        """Write the model, readable by all; return the identity of its weights."""
        with_disk(folder.parent, lambda: self.model.save_pretrained(str(folder), create_model_card=False))
        for path in (folder, *folder.rglob("*")):
            # The server's user reads them, and safetensors writes files that only their owner may read.
            path.chmod(0o755 if path.is_dir() else 0o644)
        return weights_identity(HostSettings(model=str(folder)))

    @property
    def bytes(self) -> int:
        """Return the size of the weights."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    @property
    def files(self) -> int:
        """Return the size of the model's files."""
        files = [path.stat().st_size for path in Path(self.base.model).rglob("*") if path.is_file()]
        return max(sum(files), self.bytes) if os.path.isabs(self.base.model) else self.bytes


def require_room(folder: Path, trainee: Trainee) -> None:
    """Raise InsufficientDisk if the checkpoints and the model have no room."""
    # A checkpoint is a whole model and two moments of each weight. While one is written, those that are kept are there, too.
    needed = (trainee.files + _MOMENTS * trainee.bytes + _REST) * (_KEPT + 1) + trainee.files
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InsufficientDisk(
            f"{folder} has {free / 1e6:,.1f} MB free, and checkpoints take {needed / 1e6:,.1f} MB",
            hint="Name another directory with --output.",
        )


def with_disk(folder: Path, action: Callable[[], Any]) -> Any:
    """Run an action that writes; raise InsufficientDisk if the disk was full."""
    try:
        return action()
    except Exception as error:
        # The libraries raise errors of their own, of several classes.
        if not any(words in str(error).lower() for words in _DISK_WORDS):
            raise
        raise InsufficientDisk(
            f"the disk of {folder} is full, or its quota is used up",
            detail=" ".join(str(error).split())[:200],
            hint="Make room and run the same command again: it goes on from the last whole checkpoint.",
        ) from error


def machine(model: SentenceTransformer) -> dict[str, Any]:
    """Return all that may change the last bits of a training."""
    import torch

    device = torch.cuda.get_device_name() if model.device.type == "cuda" else _processor()
    return {
        "libraries": {name: version(name.replace("_", "-")) for name in (*LIBRARIES, "tokenizers", "numpy")},
        "python": platform.python_version(), "device": device, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _quiet() -> None:
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _deterministic() -> None:
    import torch

    # Read by cuBLAS at its start; without it the sums of a GPU come in any order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def _progress(report: Report) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        """Report each step."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            report(state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            report(state.global_step, state.max_steps)

    return Progress()


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint; a killed run may have left one that is not."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if _is_whole(path):
            return path
        shutil.rmtree(path)
    return None


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / _PARTS[-1]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((path / part).is_file() for part in _PARTS)
