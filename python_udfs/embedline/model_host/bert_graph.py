"""Write the ONNX graph of a BERT encoder straight from its weights, without torch.

It covers the sentence-transformers models that are a plain BERT with mean or CLS pooling, normalised or not: MiniLM,
BGE, E5, GTE and their kin. `read` returns None for all other models, and torch then exports them.

The graph computes the same as transformers' BertModel, operation by operation, and quantises to the same int8 weights
as torch's export. Tests compare both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedline.model_host.choice import tensor_types

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

_OPSET, _IR_VERSION = 17, 8
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Values that transformers takes for missing keys of config.json. Any other value would need another graph.
_PLAIN_CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# Weights that the graph does not need: a constant, and a pooler that sentence-transformers does not use.
_IGNORED_PREFIXES = ("embeddings.position_ids", "pooler.")
# Most bytes of weights, because a protobuf holds 2 GB. torch's exporter keeps larger weights in a file of their own.
_LARGEST_BYTES = 1_800_000_000
# Smallest divisors of torch.nn.functional.normalize and of Pooling.
_MIN_NORM, _MIN_TOKENS = 1e-12, 1e-9


@dataclass(frozen=True)
class Bert:
    """A BERT encoder with its pooling.

    `max_length` counts the special tokens; `pooling` is "mean" or "cls".
    """

    directory: str
    config: Mapping[str, Any]
    max_length: int
    pooling: str
    is_normalised: bool
    pad_token: str

    @property
    def dimensions(self) -> int:
        """Return the width of its vectors."""
        return int(self.config["hidden_size"])

    @property
    def max_tokens(self) -> int:
        """Return the longest text in tokens, without special tokens."""
        return self.max_length - int(self._read_tokenizer().num_special_tokens_to_add(False))

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer with transformers' truncation and padding."""
        tokenizer = self._read_tokenizer()
        tokenizer.enable_truncation(self.max_length)
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(self.pad_token), pad_token=self.pad_token)
        return tokenizer

    def write(self, path: str) -> None:
        """Write the graph.

        Its input are token ids, its output sentence embeddings of shape (texts, dimensions).
        """
        import onnx

        model = _Graph(self).model()
        onnx.checker.check_model(model)
        onnx.save_model(model, path)

    def _read_tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(os.path.join(self.directory, "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def read(directory: str) -> Bert | None:
    """Return the model in a directory, None unless it is a BERT for this module."""
    try:
        config = _read_json(directory, "config.json")
        modules = _read_json(directory, "modules.json")
        sentence = _read_json(directory, "sentence_bert_config.json")
        words = _read_json(directory, "tokenizer_config.json")
        normalizer = _read_json(directory, "tokenizer.json")["normalizer"]
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        folders = [str(module["path"]) for module in modules]
        pooling = _pooling(_read_json(os.path.join(directory, folders[1]), "config.json"))
        max_length = int(sentence["max_seq_length"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    is_plain = (
        kinds[:2] == ["Transformer", "Pooling"]
        and kinds[2:] in ([], ["Normalize"])
        and folders[0] == ""
        and all(config.get(key, value) == value for key, value in _PLAIN_CONFIG.items())
        and not sentence.get("do_lower_case", False)
        and max_length <= int(config["max_position_embeddings"])
        # transformers would change a tokenizer that does not fit its configuration, or truncate and pad at the other
        # side.
        and normalizer.get("type") == "BertNormalizer"
        and normalizer.get("lowercase") == words.get("do_lower_case", True)
        and words.get("padding_side", "right") == words.get("truncation_side", "right") == "right"
        and _are_plain_weights(os.path.join(directory, "model.safetensors"))
    )
    if not is_plain or pooling is None or not isinstance(words.get("pad_token"), str):
        return None
    return Bert(directory, config, max_length, pooling, len(kinds) == 3, words["pad_token"])


def _are_plain_weights(path: str) -> bool:
    """Return True for the float32 weights of a BertModel that fit in one protobuf."""
    types = {_plain_name(name): kind for name, kind in tensor_types(path).items()}
    used = {name: kind for name, kind in types.items() if not name.startswith(_IGNORED_PREFIXES)}
    # Old checkpoints name the weights of a LayerNorm gamma and beta.
    known = {"embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias", "encoder.layer.0.output.LayerNorm.weight"}
    return known <= used.keys() and set(used.values()) == {"F32"} and os.path.getsize(path) <= _LARGEST_BYTES


def _read_json(directory: str, name: str) -> Any:
    with open(os.path.join(directory, name), encoding="utf-8") as file:
        return json.load(file)


def _pooling(config: Mapping[str, Any]) -> str | None:
    """Return "mean" or "cls", None for another pooling.

    sentence-transformers 6 writes it in another form.
    """
    if not config.get("include_prompt", True):
        return None
    mode = config.get("pooling_mode")
    if mode is None:
        names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
        active = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        mode = names.get(active[0]) if len(active) == 1 else None
    return mode if mode in ("mean", "cls") else None


class _Graph:
    """The graph under construction.

    Each method adds the nodes of one part and returns the name of its result.
    """

    def __init__(self, bert: Bert) -> None:
        self._bert = bert
        self._nodes: list[Any] = []
        self._constants: dict[str, NDArray[Any]] = {}
        self._weights = _load_weights(os.path.join(bert.directory, "model.safetensors"))

    def model(self) -> Any:
        """Return the finished onnx.ModelProto."""
        from onnx import TensorProto, helper, numpy_helper

        hidden = self._embeddings()
        mask = self._attention_mask()
        for layer in range(int(self._bert.config["num_hidden_layers"])):
            hidden = self._layer(f"encoder.layer.{layer}", hidden, mask)
        pooled = self._mean(hidden) if self._bert.pooling == "mean" else self._first(hidden)
        if self._bert.is_normalised:
            pooled = self._normalise(pooled)
        self._add("Identity", [pooled], output="sentence_embedding")
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"]) for name in _INPUTS]
        output = helper.make_tensor_value_info(
            "sentence_embedding", TensorProto.FLOAT, ["texts", self._bert.dimensions]
        )
        constants = [numpy_helper.from_array(value, name) for name, value in self._constants.items()]
        graph = helper.make_graph(self._nodes, "bert", inputs, [output], constants)
        opsets = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="embedline")

    # Parts of BertModel

    def _embeddings(self) -> str:
        import numpy as np

        words = self._add("Gather", [self._weight("embeddings.word_embeddings.weight"), "input_ids"])
        types = self._add("Gather", [self._weight("embeddings.token_type_embeddings.weight"), "token_type_ids"])
        count = int(self._bert.config["max_position_embeddings"])
        positions = self._constant("positions", np.arange(count, dtype=np.int64)[None, :])
        tokens = self._add(
            "Slice", [self._add("Shape", ["input_ids"]), *(self._integers(value) for value in (1, 2, 0))]
        )
        used = self._add("Slice", [positions, self._integers(0), tokens, self._integers(1)])
        places = self._add("Gather", [self._weight("embeddings.position_embeddings.weight"), used])
        total = self._add("Add", [self._add("Add", [words, types]), places])
        return self._layer_norm("embeddings.LayerNorm", total)

    def _attention_mask(self) -> str:
        """Return the term to add to the attention's scores.

        It is 0 for a token and the least number for padding.
        """
        import numpy as np

        mask = self._add("Unsqueeze", [self._float_mask(), self._integers(1, 2)])
        absent = self._add("Sub", [self._scalar("one", 1.0), mask])
        return self._add("Mul", [absent, self._scalar("least", float(np.finfo(np.float32).min))])

    def _layer(self, name: str, hidden: str, mask: str) -> str:
        attended = self._linear(
            f"{name}.attention.output.dense", self._attention(f"{name}.attention.self", hidden, mask)
        )
        hidden = self._layer_norm(f"{name}.attention.output.LayerNorm", self._add("Add", [attended, hidden]))
        wide = self._gelu(self._linear(f"{name}.intermediate.dense", hidden))
        narrow = self._linear(f"{name}.output.dense", wide)
        return self._layer_norm(f"{name}.output.LayerNorm", self._add("Add", [narrow, hidden]))

    def _attention(self, name: str, hidden: str, mask: str) -> str:
        heads = int(self._bert.config["num_attention_heads"])
        size = self._bert.dimensions // heads
        split, joined = self._integers(0, 0, heads, size), self._integers(0, 0, heads * size)

        def part(which: str, order: list[int]) -> str:
            rows = self._add("Reshape", [self._linear(f"{name}.{which}", hidden), split])
            return self._add("Transpose", [rows], perm=order)

        query, key = part("query", [0, 2, 1, 3]), part("key", [0, 2, 3, 1])
        scores = self._add("MatMul", [query, key])
        scores = self._add("Div", [scores, self._scalar("head_norm", float(size) ** 0.5)])
        shares = self._add("Softmax", [self._add("Add", [scores, mask])], axis=-1)
        mixed = self._add("MatMul", [shares, part("value", [0, 2, 1, 3])])
        return self._add("Reshape", [self._add("Transpose", [mixed], perm=[0, 2, 1, 3]), joined])

    def _linear(self, name: str, value: str) -> str:
        product = self._add("MatMul", [value, self._weight(f"{name}.weight", transposed=True)])
        return self._add("Add", [product, self._weight(f"{name}.bias")])

    def _layer_norm(self, name: str, value: str) -> str:
        return self._add(
            "LayerNormalization",
            [value, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")],
            axis=-1,
            epsilon=float(self._bert.config.get("layer_norm_eps", 1e-12)),
        )

    def _gelu(self, value: str) -> str:
        share = self._add("Erf", [self._add("Div", [value, self._scalar("root_of_two", 2.0**0.5)])])
        product = self._add("Mul", [value, self._add("Add", [share, self._scalar("one", 1.0)])])
        return self._add("Mul", [product, self._scalar("half", 0.5)])

    # Pooling

    def _mean(self, hidden: str) -> str:
        mask = self._add("Unsqueeze", [self._float_mask(), self._integers(2)])
        total = self._add("ReduceSum", [self._add("Mul", [hidden, mask]), self._integers(1)], keepdims=0)
        count = self._add("ReduceSum", [mask, self._integers(1)], keepdims=0)
        return self._add("Div", [total, self._add("Max", [count, self._scalar("min_tokens", _MIN_TOKENS)])])

    def _first(self, hidden: str) -> str:
        import numpy as np

        return self._add("Gather", [hidden, self._constant("first", np.array(0, dtype=np.int64))], axis=1)

    def _normalise(self, value: str) -> str:
        norm = self._add("ReduceL2", [value], axes=[1], keepdims=1)
        return self._add("Div", [value, self._add("Max", [norm, self._scalar("min_norm", _MIN_NORM)])])

    # Nodes and constants

    def _add(self, operation: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = output or f"{operation}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operation, inputs, [name], name=f"node_{name}", **attributes))
        return name

    def _float_mask(self) -> str:
        from onnx import TensorProto

        return self._add("Cast", ["attention_mask"], to=TensorProto.FLOAT)

    def _weight(self, name: str, *, transposed: bool = False) -> str:
        import numpy as np

        value = self._weights[name]
        return self._constant(name, np.ascontiguousarray(value.T if transposed else value))

    def _scalar(self, name: str, value: float) -> str:
        import numpy as np

        return self._constant(name, np.array(value, dtype=np.float32))

    def _integers(self, *values: int) -> str:
        import numpy as np

        return self._constant("integers_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self._constants[name] = value
        return name


def _load_weights(path: str) -> dict[str, NDArray[np.float32]]:
    """Return the weights by BertModel's names.

    Checkpoints of a model with a head have them below "bert.".
    """
    from safetensors.numpy import load_file

    tensors = {_plain_name(name): value for name, value in load_file(path).items()}
    return {name: value for name, value in tensors.items() if not name.startswith(_IGNORED_PREFIXES)}


def _plain_name(name: str) -> str:
    return name.removeprefix("bert.")
