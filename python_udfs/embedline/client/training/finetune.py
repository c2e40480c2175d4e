"""Train a registered model further, measure its gain, and register it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embedline
from embedline.client.connection import Connection
from embedline.client.training import measuring, registered
from embedline.client.training.corpus import Corpus, read_corpus
from embedline.client.training.examples import Example, Sources, examples_hash, make_examples
from embedline.client.training.measuring import Matrix
from embedline.client.training.pairs import Pair, Pairs, is_held_out, read_pairs, require_no_canaries
from embedline.client.training.request import Parameters, Request, require_libraries
from embedline.client.training.run_folder import RunFolder, run_path
from embedline.client.training.trainer import Base, Trainee, machine, require_room
from embedline.client.transfer.recipe import VersionRecipe, read_recipe
from embedline.core.statistics import FloatArray
from embedline.errors import AlreadyExists, InvalidParameter, NotReady

# Says what is done now: the step, how much of it is done, and of how much.
Report = Callable[[str, int, int], None]
# Fewest held-out queries that a comparison takes.
_LEAST_HELD_OUT = 5


@dataclass(frozen=True)
class Finetuned:
    """What a run has made."""

    name: str
    base: str
    path: str
    outcome: str
    metrics: dict[str, Any]
    pairs_hash: str
    trained_queries: int
    examples: int
    resumed_from: int | None
    notes: list[str]


def finetune(connection: Connection, request: Request, report: Report) -> Finetuned:
    """Train, measure and register; a killed run of the same request is gone on with.

    Raises EmbedlineError, psycopg.Error, OSError. `connection` is in autocommit mode.
    """
    require_libraries()
    registered.require_superuser(connection)
    base = registered.read_base(connection, request.base)
    target = _target(request, base)
    registered.require_free(connection, request.name, target)
    recipe = read_recipe(connection, request.pipeline, None)
    registered.require_texts(connection, request.pipeline)
    pairs = read_pairs(connection, request.pairs)
    require_no_canaries(connection, request.pipeline, pairs)
    parameters = request.parameters(is_static=base.is_static)
    folder = RunFolder(run_path(target))
    with folder.held():
        if request.model_path is None:
            registered.require_seen(connection, target.parent)
        # Which pairs have rows is known before the hash is taken: a resumed run compares it.
        corpus = read_corpus(connection, recipe, {pair.key for pair in pairs.pairs}, request.corpus)
        pairs = pairs.only(corpus.documents)
        asked = {
            "pipeline": request.pipeline, "base": request.base, "base_fingerprint": base.fingerprint, "pairs": pairs.hash,
            "seed": request.seed, **parameters.as_dict(),
        }  # fmt: skip
        folder.begin(asked, restart=request.restart)
        resumed = None
        lineage = folder.result()
        if lineage is None:
            if target.exists():
                raise AlreadyExists(f"{target} exists already", hint="Choose another --name, or remove it.")
            work = Work(connection, recipe, corpus, pairs, parameters, request.seed, report)
            lineage, resumed = work.run(base, folder, request.device)
            folder.keep_result(lineage)
        split = [(pair, is_held_out(pair.hash, parameters.held_out, request.seed)) for pair in pairs.pairs]
        path = request.model_path or str(target)
        if lineage["outcome"] != "loss":
            folder.place(target)
            report("registering the model", 0, 1)
            registered.register(connection, request.name, path, lineage, split)
            folder.clean()
    trained = {pair.hash for pair, held_out in split if not held_out}
    return Finetuned(
        request.name, request.base, path, lineage["outcome"], lineage["metrics"], lineage["pairs_hash"], len(trained),
        lineage["evidence"]["examples"], resumed, pairs.notes,
    )  # fmt: skip


def _target(request: Request, base: Base) -> Path:
    """Return the directory of the new model, by default beside the base's."""
    if request.output is not None:
        return request.output.absolute() / request.name
    if not Path(base.model).is_absolute():
        raise InvalidParameter(
            f'model "{base.name}" is one of the hub, so there is no directory beside it',
            hint="Name the directory for the new model with --output; the server must be able to read it.",
        )
    return Path(base.model).parent / request.name


@dataclass(frozen=True)
class Work:
    """The training of a run: from pairs to a measured model."""

    connection: Connection
    recipe: VersionRecipe
    corpus: Corpus
    pairs: Pairs
    parameters: Parameters
    seed: int
    report: Report

    def run(self, base: Base, folder: RunFolder, device: str | None) -> tuple[dict[str, Any], int | None]:
        """Train and measure; return the lineage, and the step that the run went on from."""
        self.report("loading the model", 0, 1)
        trainee = Trainee.load(base, device)
        folder.checkpoints.mkdir(exist_ok=True)
        require_room(folder.path, trainee)
        grades, queries = self._held_out()
        examples, before = folder.examples(), folder.before(self.corpus.hash)
        if examples is None or before is None:
            chunks = self._encode(trainee, "reading the chunks with the base")
            before = self._score(trainee, chunks, queries, grades)
            examples = examples or self.examples(trainee, chunks)
            folder.remember(examples, self.corpus.hash, before)
        resumed = trainee.train(examples, self.parameters, self.seed, folder.checkpoints, self._step("training"))
        weights = trainee.save(folder.model)
        chunks = self._encode(trainee, "reading the chunks with the new model")
        after = self._score(trainee, chunks, queries, grades)
        outcome, metrics = measuring.compare(before, after, self.seed)
        evidence = {
            "base_weights": trainee.weights, "examples_hash": examples_hash(examples), "examples": len(examples),
            "weights": weights, "corpus": self.corpus.hash, "corpus_chunks": len(self.corpus.keys),
            **machine(trainee.model),
        }  # fmt: skip
        lineage = {
            "base": base.name, "base_model": base.model, "base_fingerprint": base.fingerprint,
            "pipeline": self.recipe.pipeline, "pairs_table": self.pairs.table, "pairs_hash": self.pairs.hash,
            "parameters": self.parameters.as_dict(), "seed": self.seed, "code_version": embedline.__version__,
            "evidence": evidence, "metrics": metrics, "outcome": outcome,
        }  # fmt: skip
        return lineage, resumed

    def examples(self, trainee: Trainee, chunks: Matrix) -> list[Example]:
        """Return the examples of the pairs that train."""
        pairs = [pair for pair in self.pairs.pairs if not self._is_held_out(pair)]
        spelled = {pair.hash: pair.query for pair in pairs}
        vectors = trainee.encode(list(spelled.values()), trainee.base.query_prefix, _silent)
        sources = Sources(
            self.connection, self.recipe.pipeline, registered.has_keywords(self.connection, self.recipe.pipeline),
            self.corpus, chunks,
        )  # fmt: skip
        return make_examples(
            sources, pairs, dict(zip(spelled, vectors, strict=True)), self.parameters.negatives, self.seed,
            self._step("looking for hard negatives"),
        )  # fmt: skip

    def encode_corpus(self, trainee: Trainee) -> Matrix:
        """Return the vectors of all chunks by the base."""
        return self._encode(trainee, "reading the chunks with the base")

    def _held_out(self) -> tuple[list[dict[str, float]], list[str]]:
        """Return the held-out queries with the grades of their keys."""
        grades: dict[str, dict[str, float]] = {}
        for pair in self.pairs.pairs:
            if pair.grade > 0 and self._is_held_out(pair):
                grades.setdefault(pair.query, {})[pair.key] = pair.grade
        trained = len(self.pairs.queries) - len(grades)
        if len(grades) < _LEAST_HELD_OUT or trained < _LEAST_HELD_OUT:
            raise NotReady(
                f"{trained} queries to train on and {len(grades)} to measure by are too few",
                hint="Add pairs, or name another share with --held-out.",
            )
        return list(grades.values()), list(grades)

    def _is_held_out(self, pair: Pair) -> bool:
        return is_held_out(pair.hash, self.parameters.held_out, self.seed)

    def _encode(self, trainee: Trainee, step: str) -> Matrix:
        return trainee.encode(self.corpus.texts, trainee.base.document_prefix, self._step(step))

    def _score(
        self, trainee: Trainee, chunks: Matrix, queries: list[str], grades: list[dict[str, float]]
    ) -> FloatArray:
        vectors = trainee.encode(queries, trainee.base.query_prefix, _silent)
        return measuring.score(vectors, chunks, self.corpus, grades)

    def _step(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report(name, done, total)


def _silent(done: int, total: int) -> None:
    """Tell nothing of a step that takes moments."""
