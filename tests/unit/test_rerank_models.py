"""Cross-encoders in onnxruntime and in torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedline.core.embedding import ModelConfig
from embedline.core.reranking import Pair, RerankScores, pack_scores
from embedline.errors import InvalidParameter, InvalidScores, ProviderMisconfigured
from embedline.model_host.host_settings import HostSettings, settings_of
from embedline.model_host.inference import load_model
from embedline.model_host.rerank_backends import OnnxReranker, load_reranker, longest_pair
from support import MODELS

RERANKER = str(MODELS / "reranker")
QUERY = "How many people live in Berlin?"
# The example of the model's card; the first text answers the query.
TEXTS = [
    "Berlin has a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "New York City is famous for the Metropolitan Museum of Art.",
    "Berlin is well known for its museums.",
]


@pytest.fixture(scope="module")
def onnx() -> OnnxReranker:
    return OnnxReranker(RERANKER, "cpu")


def config(model: str = RERANKER, **options: object) -> ModelConfig:
    return ModelConfig("r", "sentence-transformers", model, task="rerank", options=options)


def test_the_published_model_ranks_as_its_card_says(onnx: OnnxReranker) -> None:
    right, far, near = onnx.forward([Pair(QUERY, text) for text in TEXTS]).ravel().tolist()
    assert right > 5
    assert right > near > far
    assert far < -5


def test_a_score_does_not_depend_on_the_other_texts(onnx: OnnxReranker) -> None:
    texts = [*TEXTS, "Berlin " * 300]
    together = onnx.forward([Pair(QUERY, text) for text in texts])
    alone = np.concatenate([onnx.forward([Pair(QUERY, text)]) for text in texts])
    np.testing.assert_array_equal(together, alone)


def test_a_pair_that_is_too_long_is_cut(onnx: OnnxReranker) -> None:
    (score,) = onnx.forward([Pair(QUERY, TEXTS[0] + " And more of it." * 2000)]).ravel()
    assert np.isfinite(score)
    assert onnx.max_tokens == 509


def test_only_the_graphs_files_and_the_task_make_the_fingerprint() -> None:
    settings = settings_of(config())
    assert (settings.backend, settings.task) == ("onnx", "rerank")
    with tempfile.TemporaryDirectory() as folder:
        before = load_model(settings).describe(f"{folder}/tokenizer")
        copied = Path(folder) / "copy"
        shutil.copytree(RERANKER, copied)
        (copied / "README.md").write_text("no part of the model")
        after = load_model(settings_of(config(str(copied)))).describe(f"{folder}/tokenizer")
        limits = json.loads((copied / "tokenizer_config.json").read_text()) | {"model_max_length": 128}
        (copied / "tokenizer_config.json").write_text(json.dumps(limits))
        cut = load_model(settings_of(config(str(copied)))).describe(f"{folder}/tokenizer")
    assert before == after
    assert (before["dimensions"], before["max_tokens"], before["tokenizer_path"]) == (0, 509, None)
    assert cut["fingerprint"] != before["fingerprint"]
    assert cut["max_tokens"] == 125


def test_a_reranker_has_another_host_than_an_embedder_of_the_same_files() -> None:
    same = {"model": RERANKER, "backend": "onnx"}
    assert HostSettings(**same).name != HostSettings(**same, task="rerank").name


def test_a_graph_of_vectors_is_no_reranker() -> None:
    with pytest.raises(ProviderMisconfigured, match="returns 384 values"):
        load_model(settings_of(config(str(MODELS / "minilm"))))


def test_a_directory_without_a_graph_is_refused_by_name() -> None:
    settings = settings_of(config(str(MODELS / "all-MiniLM-L6-v2"), backend="onnx"))
    with pytest.raises(ProviderMisconfigured, match="no cross-encoder"):
        load_reranker(settings)


def test_the_precision_of_a_graph_is_no_option() -> None:
    with pytest.raises(InvalidParameter, match="used as it is"):
        settings_of(config(precision="int8"))


def test_a_model_without_a_limit_takes_that_of_bert(tmp_path: Path) -> None:
    assert longest_pair(str(tmp_path)) == 512
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8192}')
    assert longest_pair(str(tmp_path)) == 8192


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(score: float) -> None:
    with pytest.raises(InvalidScores) as error:
        pack_scores([1.0, score]).values()
    assert "text 2 of 2" in str(error.value.detail)


def test_scores_are_float32() -> None:
    assert RerankScores(1, np.array([0.1], "<f4").tobytes()).values() == [float(np.float32(0.1))]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Path]:
    """A cross-encoder of random weights as sentence-transformers reads it, with its graph beside."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tiny"
        tokenizer = BertTokenizerFast(str(MODELS / "reranker" / "vocab.txt"), model_max_length=64)
        torch.manual_seed(5)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        # Random weights of the usual range, 0.02, give all pairs nearly the same score.
        made = BertConfig(
            vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, initializer_range=0.4, **sizes
        )
        made._attn_implementation = "eager"
        model = BertForSequenceClassification(made).eval()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        given = tokenizer([QUERY] * 2, TEXTS[:2], padding=True, return_tensors="pt")
        # In the order of the model's parameters, by which the exporter names them.
        inputs = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        axes = {name: {0: "pairs", 1: "tokens"} for name in inputs} | {"logits": {0: "pairs"}}
        torch.onnx.export(
            model,
            (inputs,),
            str(folder / "model.onnx"),
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_axes=axes,
            dynamo=False,
        )
        yield folder


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_torch_and_onnxruntime_give_the_same_scores(tiny: Path) -> None:
    pairs = [Pair(QUERY, text) for text in [*TEXTS, "Berlin. " * 100]]
    in_torch = load_reranker(settings_of(config(str(tiny), backend="torch")))
    in_onnx = load_reranker(settings_of(config(str(tiny))))
    wanted, got = in_torch.forward(pairs), in_onnx.forward(pairs)
    assert wanted.shape == (4, 1)
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert in_torch.max_tokens == in_onnx.max_tokens == 61


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_model_without_a_head_is_no_reranker_in_torch() -> None:
    settings = settings_of(config(str(MODELS / "all-MiniLM-L6-v2")))
    assert settings.backend == "torch"
    with pytest.raises(ProviderMisconfigured, match="it is a BertModel"):
        load_model(settings)
