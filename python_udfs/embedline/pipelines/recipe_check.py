"""Check a recipe: chunking, index, weight, and what a model can hold."""

from __future__ import annotations

import math
from typing import Any

from embedline.catalog.values import Model
from embedline.chunking import ChunkingSpec, chunking_spec
from embedline.errors import InvalidParameter
from embedline.postgres.session import as_mapping

# pgvector 0.8: HNSW indexes up to 2,000 dimensions of vector and 4,000 of halfvec.
INDEX_DIMENSIONS = {"vector": 2000, "halfvec": 4000}
_DEFAULT_CHUNK_TOKENS = 256


def check_recipe(given: dict[str, Any], model: Model) -> None:
    """Raise where parameters of a version are none, or do not fit together or the model."""
    choices = {
        "column_type": ("vector", "halfvec"),
        "distance": ("cosine", "inner_product", "l2"),
        "index_method": ("hnsw", "none"),
        "capture": ("auto", "statement", "row"),
    }
    for parameter, allowed in choices.items():
        if given[parameter] not in allowed:
            raise InvalidParameter(
                f'{parameter} "{given[parameter]}" is not known', hint=f"Use one of {', '.join(allowed)}."
            )
    check_weight(given["weight"])
    dimensions = model.config.dimensions or 0
    limit = INDEX_DIMENSIONS[given["column_type"]]
    if given["index_method"] == "hnsw" and dimensions > limit:
        hint = "Use index_method => 'none', or a model of fewer dimensions."
        if given["column_type"] == "vector" and dimensions <= INDEX_DIMENSIONS["halfvec"]:
            hint = "Use column_type => 'halfvec', which HNSW indexes up to 4000 dimensions."
        raise InvalidParameter(
            f"HNSW indexes {given['column_type']} up to {limit} dimensions; {dimensions} are too many", hint=hint
        )
    options = as_mapping(given["index_options"])
    for option, value in options.items():
        low, high = {"m": (2, 100), "ef_construction": (4, 1000)}.get(option, (1, 0))
        if not isinstance(value, int) or not low <= value <= high:
            raise InvalidParameter(
                f'index option "{option}" cannot be {value}',
                hint="HNSW takes m (2 to 100) and ef_construction (4 to 1000).",
            )


def check_weight(weight: float | None) -> None:
    """Raise unless the value can be a pipeline's weight."""
    if weight is None or not 0 < weight < math.inf:
        raise InvalidParameter(
            f"weight cannot be {weight}",
            hint="Use a number above 0: a pipeline of weight 2 gets twice the share of one of 1.",
        )


def spec_for(method: str, tokens: int | None, overlap: int, options: Any, model: Model) -> ChunkingSpec:
    """Return the chunking recipe of these parameters, checked against what the model reads."""
    limit = model.max_tokens
    if tokens is None:
        tokens = min(_DEFAULT_CHUNK_TOKENS, limit or _DEFAULT_CHUNK_TOKENS)
    spec = chunking_spec(method, tokens, overlap, as_mapping(options))
    if spec.tokens is not None and limit is not None and spec.tokens > limit:
        raise InvalidParameter(
            f"chunk_tokens {spec.tokens} does not fit the model",
            detail=f'Model "{model.config.name}" reads {limit} tokens.',
            hint=f"Use chunk_tokens => {limit} or less.",
        )
    return spec
