"""Transformers that take token ids: the same vectors as SentenceTransformer.encode, whichever way the texts go."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedline.core.embedding import ModelConfig
from embedline.embedders.local import LocalEmbedder
from embedline.errors import InputRejected, ModelHostUnavailable, ProviderMisconfigured
from embedline.model_host.host_settings import HostSettings
from embedline.model_host.inference import LoadedModel, Slice
from embedline.model_host.precision import FULL, HALF, LEAST_COSINE, half_if_equal
from embedline.model_host.scheduler import Request, Scheduler, SliceLimits
from embedline.model_host.server import begin_parts, finish_parts
from embedline.model_host.tokenizing import Tokenizing
from embedline.model_host.tokens import Tokens, padded_batches
from injected_host import embedder_of, injected_host
from support import MODELS

MINILM = MODELS / "all-MiniLM-L6-v2"
TEXTS = [
    "VACUUM reclaims storage occupied by dead tuples.",
    "  How do I restore a single table?\n",
    "The query planner's cost estimates are only as good as the statistics that ANALYZE has collected. " * 9,
    "",
    "Straße, ﬁ, e\u0301, 数据库 🐘 [SEP] </s> <mask>",
    "a",
    "Write-ahead logging means that changes to data files are written only after they have been logged. " * 40,
    *(f"row {number} of the table" for number in range(9)),
]


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    wide, other = left.astype(np.float64), right.astype(np.float64)
    found: NDArray[np.float64] = np.einsum("ij,ij->i", wide, other)
    return found / np.linalg.norm(wide, axis=1) / np.linalg.norm(other, axis=1)


# Models


def small_bert(folder: Path, pooling: str = "mean", kinds: int = 3, **sentence: Any) -> Path:
    """Save a BERT of 48 dimensions with random weights and MiniLM's tokenizer; `kinds` 2 leaves out the normalisation."""
    import torch
    from transformers import BertConfig, BertModel

    shutil.copytree(MINILM, folder)
    torch.manual_seed(7)
    layers = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    BertModel(BertConfig(**layers, initializer_range=0.3)).save_pretrained(folder)
    pool = {"word_embedding_dimension": 48, f"pooling_mode_{pooling}_token{'s' * (pooling == 'mean')}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pool))
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:kinds]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64} | sentence))
    return folder


def with_dense(folder: Path) -> Path:
    """Save the same model with a layer that changes the width."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    whole = SentenceTransformer(str(small_bert(folder / "bert", kinds=2)), device="cpu")
    SentenceTransformer(modules=[*whole, Dense(48, 20)], device="cpu").save(str(folder / "model"))
    return folder / "model"


def small_roberta(folder: Path) -> Path:
    """Save a RoBERTa, whose positions depend on which tokens are padding, with a tokenizer of bytes."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    tokenizer = RobertaTokenizerFast(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=64)
    tokenizer.save_pretrained(folder / "parts")
    torch.manual_seed(7)
    layers = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = RobertaConfig(**layers, vocab_size=len(words), max_position_embeddings=66, initializer_range=0.3)
    RobertaModel(config).save_pretrained(folder / "parts")
    transformer = Transformer(str(folder / "parts"))
    SentenceTransformer(modules=[transformer, Pooling(48)], device="cpu").save(str(folder / "model"))
    return folder / "model"


def changed(folder: Path, name: str, **members: Any) -> Path:
    """Save the small BERT with other values in one of its files."""
    path = small_bert(folder / "model") / name
    path.write_text(json.dumps(json.loads(path.read_text()) | members))
    return path.parent


def with_word_weights(folder: Path) -> Path:
    """Save the small BERT with a module that reads more than the pooled vector."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    whole = SentenceTransformer(str(small_bert(folder / "bert", kinds=2)), device="cpu")
    SentenceTransformer(modules=[*whole, LayerNorm(48)], device="cpu").save(str(folder / "model"))
    return folder / "model"


FLAT: dict[str, Callable[[Path], Path]] = {
    "minilm": lambda _: MINILM,
    "cls, not normalised": lambda folder: small_bert(folder / "model", pooling="cls", kinds=2),
    "cut at 16 tokens": lambda folder: small_bert(folder / "model", max_seq_length=16),
    "with a dense layer": with_dense,
    "roberta": small_roberta,
}
ENCODED: dict[str, Callable[[Path], Path]] = {
    "padded at the beginning": lambda folder: changed(folder, "tokenizer_config.json", padding_side="left"),
    "another module": with_word_weights,
}


@pytest.mark.torch
@pytest.mark.parametrize("make", FLAT.values(), ids=FLAT.keys())
def test_vectors_of_token_ids_are_those_of_encode(make: Callable[[Path], Path], tmp_path: Path) -> None:
    from embedline.model_host.flat_transformer import flat_transformer
    from embedline.model_host.torch_backend import load_torch

    settings = HostSettings(str(make(tmp_path)), device="cpu")
    backend = load_torch(settings)
    flat = flat_transformer(backend.model)
    assert flat is not None
    wanted = backend.forward(TEXTS)
    # As a query comes, and as documents do: cut into slices of tokens, each with parts of several requests.
    model = LoadedModel(settings, backend, flat)
    np.testing.assert_allclose(model.encode(TEXTS), wanted, rtol=1e-5, atol=1e-5)
    scheduler, results = Scheduler(), [[] for _ in range(3)]
    thirds = [TEXTS[place::3] for place in range(3)]
    for texts, found in zip(thirds, results, strict=True):
        request = Request("document", texts, found.append)
        request.tokenized(flat.tokenize(texts))
        scheduler.put(request)
    while parts := scheduler.take(SliceLimits(texts=100, characters=500), wait=False):
        finish_parts(model, parts, begin_parts(model, parts))
    for place, ((rows,), texts) in enumerate(zip(results, thirds, strict=True)):
        assert rows.shape == (len(texts), model.dimensions)
        np.testing.assert_allclose(rows, wanted[place::3], rtol=1e-5, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("make", ENCODED.values(), ids=ENCODED.keys())
def test_a_model_with_more_to_it_keeps_encode(make: Callable[[Path], Path], tmp_path: Path) -> None:
    from embedline.model_host.inference import load_model
    from embedline.model_host.torch_backend import load_torch

    settings = HostSettings(str(make(tmp_path)), device="cpu")
    model = load_model(settings)
    assert model.flat is None
    np.testing.assert_allclose(model.encode(TEXTS), load_torch(settings).forward(TEXTS), rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_a_tokenizer_that_gives_other_ids_than_the_library_is_not_used(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from embedline.model_host.flat_transformer import flat_transformer

    model = SentenceTransformer(str(small_bert(tmp_path / "model")), device="cpu")
    assert flat_transformer(model) is not None
    # The library cuts texts at another length than the model says.
    model.tokenizer.model_max_length = 32
    model[0].processing_kwargs = {"text": {"max_length": 48}}
    assert flat_transformer(model) is None


@pytest.mark.torch
def test_half_precision_is_used_if_its_vectors_are_the_same() -> None:
    from embedline.model_host.flat_transformer import flat_transformer
    from embedline.model_host.torch_backend import load_torch

    loaded: list[str] = []

    def load(precision: str) -> LoadedModel:
        loaded.append(precision)
        settings = HostSettings(str(MINILM), device="cpu", precision=precision)
        backend = load_torch(settings)
        return LoadedModel(settings, backend, flat_transformer(backend.model))

    model, precision = half_if_equal(load, lambda model, texts: model.encode(texts[:8]))
    assert (precision, loaded) == (HALF, [FULL, HALF])
    found, wanted = model.encode(TEXTS[:6]), load(FULL).encode(TEXTS[:6])
    assert cosines(found, wanted).min() >= LEAST_COSINE
    assert not np.array_equal(found, wanted)


def test_full_precision_is_used_if_half_of_it_gives_other_vectors() -> None:
    full = np.array([[1.0, 0.0], [0.6, 0.8]], dtype=np.float32)
    # A cosine of 0.9984, a number that overflowed, and no direction at all.
    for half in (full + np.float32([[0, 0], [0, 0.1]]), full * np.float32("nan"), full * np.float32(0)):
        loaded: list[str] = []

        def load(name: str, loaded: list[str] = loaded) -> str:
            loaded.append(name)
            return name

        rows = {FULL: full, HALF: half}
        found, precision = half_if_equal(load, lambda name, _texts, rows=rows: rows[name])
        assert (found, precision, loaded) == (FULL, FULL, [FULL, HALF, FULL])


@pytest.mark.torch
def test_a_host_gives_documents_and_queries_the_same_vectors(tmp_path: Path) -> None:
    from embedline.model_host.torch_backend import load_torch

    folder = small_bert(tmp_path / "model")
    wanted = load_torch(HostSettings(str(folder), device="cpu")).forward(TEXTS)
    config = ModelConfig("small", "sentence-transformers", str(folder), options={"device": "cpu"})
    with tempfile.TemporaryDirectory(prefix="el-") as root, subprocess.Popen(["sleep", "600"]) as owner:
        embedder = LocalEmbedder(config, owner_pid=owner.pid, runtime_root=root)
        try:
            embedder.probe().result(120)
            # The first request comes while the model loads, the others when its tokenizer has begun.
            for futures in (
                [embedder.submit(TEXTS, "document") for _ in range(4)],
                [embedder.submit(TEXTS, kind) for kind in ("query", "document")],
            ):
                for future in futures:
                    block = future.result(120)
                    found = np.frombuffer(block.data, dtype="<f4").reshape(block.count, block.dimensions)
                    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        finally:
            embedder.close()
            owner.kill()


# Without a model


class FakeFlat:
    """A model of two slices at once, whose tokens are a text's letters; "poison" fails, and large slices do not fit."""

    in_flight = 2

    def __init__(self, capacity: int = 10**9) -> None:
        self.capacity = capacity
        self.begun: list[int] = []

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        if "no tokens" in texts:
            raise ValueError("bad text")
        letters = [ord(letter) for text in texts for letter in text]
        return Tokens(np.array([len(text) for text in texts], np.int32), np.array(letters, np.int32))

    def start(self, tokens: Tokens) -> Callable[[], NDArray[np.float32]]:
        if len(tokens) > self.capacity:
            raise RuntimeError("CUDA out of memory")
        self.begun.append(len(tokens))
        rows = np.array(
            [
                [tokens.ids[start : start + size].sum(), size]
                for start, size in zip(tokens.starts, tokens.lengths, strict=True)
            ],
            dtype=np.float32,
        )

        def wait() -> NDArray[np.float32]:
            letters = "".join(map(chr, tokens.ids))
            if "poison" in letters:
                raise ValueError("bad text")
            if "lost" in letters:
                raise RuntimeError("CUDA error: device-side assert triggered")
            return rows

        return wait


class Unused:
    slice_characters = 1024
    modalities = ("text",)
    max_tokens = None

    def free_memory(self) -> None:
        """Nothing is kept."""

    def tokenizer(self) -> None:
        """It has none."""


def fake_model(capacity: int = 10**9) -> LoadedModel:
    backend: Any = Unused()
    return LoadedModel(HostSettings("/fake"), backend, FakeFlat(capacity))


def load_fake(_settings: HostSettings) -> LoadedModel:
    """Make the model for a host of its own."""
    return fake_model()


def test_a_host_with_two_slices_begun_answers_each_request_with_its_own_rows() -> None:
    settings = HostSettings("/fake")
    texts = [f"text {number} {'x' * (number % 50)}" for number in range(400)]
    wanted = [[sum(map(ord, text)), len(text)] for text in texts]
    with tempfile.TemporaryDirectory(prefix="el-") as root, injected_host(__file__, "load_fake", settings, root):
        embedders = [embedder_of(settings, root, os.getpid()) for _ in range(2)]
        futures = [
            (first, embedders[first % 2].submit(texts[first : first + 40], "query" if first % 80 else "document"))
            for first in range(0, 400, 10)
        ]
        poisoned = embedders[0].submit(["ab", "poison"], "document")
        for first, future in futures:
            block = future.result(60)
            rows = np.frombuffer(block.data, dtype="<f4").reshape(block.count, block.dimensions)
            assert rows.tolist() == wanted[first : first + 40]
        with pytest.raises(InputRejected):
            poisoned.result(60)
        lost = [embedder.submit(["lost"], "document") for embedder in embedders]
        # A request that the host did not fail itself is sent to another host, which has no such model.
        with pytest.raises((ModelHostUnavailable, ProviderMisconfigured)):
            lost[0].result(60)
        for embedder in embedders:
            embedder.close()


def tokenized(flat: FakeFlat, texts: list[str]) -> tuple[Request, list[Any]]:
    results: list[Any] = []
    request = Request("document", texts, results.append)
    request.tokenized(flat.tokenize(texts))
    return request, results


def test_a_slice_of_tokens_is_bounded_by_their_number_and_not_by_padding() -> None:
    scheduler, flat = Scheduler(), FakeFlat()
    first, _ = tokenized(flat, ["x" * 100, *["x" * 10] * 5])
    second, _ = tokenized(flat, ["y" * 10] * 3)
    plain = Request("document", ["z"], lambda _: None)
    for request in (first, second, plain):
        scheduler.put(request)
    # A token counts as four characters.
    limits = SliceLimits(texts=100, characters=4 * 160)
    assert scheduler.take(limits) == [(first, [0, 1, 2, 3, 4, 5]), (second, [0])]
    # A request without tokens is in another slice than those with them.
    assert scheduler.take(limits) == [(plain, [0])]
    assert scheduler.take(limits, wait=False) == [(second, [1, 2])]
    assert scheduler.take(limits, wait=False) == []


def test_slices_that_have_begun_together_end_in_their_order() -> None:
    model = fake_model()
    slices = [Slice(texts, FakeFlat().tokenize(texts)) for texts in (["ab", "c"], ["d"])]
    begun = [model.begin(each) for each in slices]
    assert [model.finish(each).tolist() for each in begun] == [[[195, 2], [99, 1]], [[100, 1]]]


def test_tokens_that_do_not_fit_into_memory_are_halved() -> None:
    model = fake_model(capacity=3)
    texts = [str(number) * 10 for number in range(8)]
    rows = model.finish(model.begin(Slice(texts, FakeFlat().tokenize(texts))))
    assert rows[:, 0].tolist() == [10 * ord(text[0]) for text in texts]
    flat = model.flat
    assert isinstance(flat, FakeFlat)
    assert flat.begun == [1, 2, 2, 2, 2]


def test_a_poisonous_text_of_a_slice_fails_its_own_request_only() -> None:
    model, flat = fake_model(), FakeFlat()
    (good, good_results), (bad, bad_results) = tokenized(flat, ["aa"]), tokenized(flat, ["poison"])
    parts = [(good, [0]), (bad, [0])]
    finish_parts(model, parts, begin_parts(model, parts))
    assert good_results[0].tolist() == [[194, 2]]
    assert isinstance(bad_results[0], InputRejected)


def test_a_text_without_tokens_fails_its_request_beside_the_model() -> None:
    passed, failed, done = [], [], threading.Event()
    tokenizing = Tokenizing(FakeFlat(), lambda request: (passed.append(request), done.set()))
    cancelled, _ = Request("document", ["never"], failed.append), None
    cancelled.cancelled = True
    good = Request("document", ["ab", "c"], failed.append)
    failing = threading.Event()
    bad = Request("document", ["no tokens"], lambda result: (failed.append(result), failing.set()))
    for request in (cancelled, bad, good):
        tokenizing.put(request)
    assert done.wait(20)
    assert failing.wait(20)
    assert passed == [good]
    assert good.tokens is not None
    assert good.tokens.lengths.tolist() == [2, 1]
    assert [type(result) for result in failed] == [InputRejected]


def test_tokens_are_selected_in_any_order() -> None:
    tokens = FakeFlat().tokenize(["abc", "", "de", "f"])
    chosen = tokens.select([3, 1, 0])
    assert "".join(map(chr, chosen.ids)) == "fabc"
    assert chosen.lengths.tolist() == [1, 0, 3]
    assert Tokens.joined([chosen, tokens.select([2])]).starts.tolist() == [0, 1, 1, 4]
    assert len(tokens.select([])) == 0


@pytest.mark.parametrize("least", [1, 200, 10**9])
def test_batches_are_filled_and_hold_every_text_once(least: int) -> None:
    lengths = np.sort(np.random.default_rng(3).integers(1, 300, 500))[::-1].astype(np.int32)
    batches = padded_batches(lengths, least)
    assert [first for first, _ in batches] == [0, *(last for _, last in batches[:-1])]
    assert batches[-1][1] == len(lengths)
    for first, last in batches:
        padded = int(lengths[first]) * (last - first)
        assert last - first == 1 or padded <= least or int(lengths[first:last].sum()) >= math.floor(0.85 * padded)
    assert (len(batches) == 1) == (least == 10**9)
    assert padded_batches(lengths[:0], least) == []


def test_every_starter_gives_a_host_the_same_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedline.model_host.launcher import host_environment

    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    cores = str(len(os.sched_getaffinity(0)))
    for value in (None, "1", "false"):
        for name in names:
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        found = host_environment(HostSettings("/m"))
        assert [found[name] for name in names] == [cores, "1", "true"]
