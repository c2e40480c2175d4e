"""Make a trained model again from its lineage, and compare the weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embedline
from embedline.client.connection import Connection
from embedline.client.training import registered
from embedline.client.training.corpus import read_corpus
from embedline.client.training.examples import Example, examples_hash
from embedline.client.training.finetune import Report, Work
from embedline.client.training.pairs import Pairs
from embedline.client.training.registered import Training
from embedline.client.training.request import Parameters, require_libraries
from embedline.client.training.run_folder import RunFolder, kept_examples
from embedline.client.training.trainer import Trainee, machine, require_room
from embedline.client.transfer.recipe import read_recipe


@dataclass(frozen=True)
class Retrained:
    """The result: whether the weights are the same bit for bit, and what differs."""

    name: str
    is_same: bool
    weights: str
    differences: list[str]
    path: str | None


def retrain(connection: Connection, name: str, output: Path | None, device: str | None, report: Report) -> Retrained:
    """Train again on the recorded pairs, with the recorded parameters and seed.

    The new weights are removed if they are the same, and kept if they differ. Raises EmbedlineError, psycopg.Error, OSError.
    """
    require_libraries()
    training = registered.read_training(connection, name)
    training.base.require_trainable()
    model = Path(training.model)
    target = (output.absolute() if output else model.parent) / f"{model.name}.retrained"
    folder = RunFolder(target)
    with folder.held():
        folder.clear()
        report("loading the model", 0, 1)
        trainee = Trainee.load(training.base, device)
        folder.checkpoints.mkdir()
        require_room(folder.path, trainee)
        differences = _changed(training, trainee)
        examples = kept_examples(model, training.evidence["examples_hash"])
        if examples is None:
            examples, changed = _examples(connection, training, trainee, report)
            differences += changed
        parameters = Parameters(**training.parameters)
        trainee.train(examples, parameters, training.seed, folder.checkpoints, _step(report, "training"))
        weights = trainee.save(folder.model)
        is_same = weights == training.evidence["weights"]
        shutil.rmtree(folder.checkpoints)
        if is_same:
            folder.clear()
    if is_same:
        target.rmdir()
    elif not differences:
        differences.append("nothing that is recorded: a library computes in another order each time")
    return Retrained(name, is_same, weights, differences, None if is_same else str(folder.model))


def _step(report: Report, name: str) -> Callable[[int, int], None]:
    return lambda done, total: report(name, done, total)


def _changed(training: Training, trainee: Trainee) -> list[str]:
    """Return in words what is not as it was."""
    then, now = training.evidence, machine(trainee.model)
    found = []
    if then["base_weights"] != trainee.weights:
        found.append(f"base {training.base.name}: its weights have changed since")
    if training.code_version != embedline.__version__:
        found.append(f"embedline: {training.code_version} then, {embedline.__version__} now")
    libraries = then["libraries"]
    found += [
        f"{name}: {libraries.get(name)} then, {version} now"
        for name, version in now["libraries"].items()
        if libraries.get(name) != version
    ]
    found += [
        f"{name}: {then.get(name)} then, {now[name]} now"
        for name in ("python", "device", "threads")
        if then.get(name) != now[name]
    ]
    return found


def _examples(
    connection: Connection, training: Training, trainee: Trainee, report: Report
) -> tuple[list[Example], list[str]]:
    """Return examples of the recorded pairs and of the rows as they are now."""
    recipe = read_recipe(connection, training.pipeline, None)
    parameters = Parameters(**training.parameters)
    corpus = read_corpus(connection, recipe, {pair.key for pair in training.pairs}, parameters.corpus)
    known = set(corpus.documents)
    pairs = [pair for pair in training.pairs if pair.key in known]
    differences = []
    if len(pairs) < len(training.pairs):
        differences.append(
            f"rows: {len(training.pairs) - len(pairs)} of {len(training.pairs)} pairs name rows that are gone"
        )
    work = Work(
        connection, recipe, corpus, Pairs(training.pairs_table, pairs, []), parameters, training.seed, report
    )  # fmt: skip
    examples = work.examples(trainee, work.encode_corpus(trainee))
    if examples_hash(examples) != training.evidence["examples_hash"]:
        is_same = corpus.hash == training.evidence["corpus"]
        differences.append(
            "hard negatives: the pipeline ranks others now" if is_same else "texts: the rows have changed since"
        )
    return examples, differences


def as_dict(result: Retrained) -> dict[str, Any]:
    """Return the result for a program."""
    return {
        "name": result.name, "same": result.is_same, "weights": result.weights, "differences": result.differences,
        "path": result.path,
    }  # fmt: skip
