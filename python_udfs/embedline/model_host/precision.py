"""Choose the precision of a model on an accelerator."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger("embedline.model_host")

Model = TypeVar("Model")

# Least cosine of a text's vectors in half and in full precision. all-MiniLM-L6-v2 has 0.999998 in
# float16, over the texts below.
LEAST_COSINE = 0.9995
HALF, FULL = "float16", "float32"
_SENTENCES = (
    "VACUUM reclaims storage occupied by dead tuples.",
    "How do I restore a single table?",
    "Die Suche nach Bedeutung findet auch andere Wörter.",
    "数据库中的向量与其来源行保持一致。",
    "SELECT id, body FROM docs WHERE id = 42; -- 1e-9",
    "a",
)
# Texts of each length in sentences. The longest are cut by most models.
_LENGTHS = (1, 4, 16, 120)


def probe_texts() -> list[str]:
    """Return texts of several lengths and scripts."""
    count = len(_SENTENCES)
    return [
        " ".join(_SENTENCES[(first + step) % count] for step in range(length))
        for length in _LENGTHS
        for first in range(count)
    ]


def half_if_equal(
    load: Callable[[str], Model], rows: Callable[[Model, list[str]], NDArray[np.float32]]
) -> tuple[Model, str]:
    """Return the model in half or in full precision, and which it is.

    Half precision is taken if its vectors are those of full precision. One model is in memory at a time. `load` takes
    the name of a precision.
    """
    texts = probe_texts()
    full = rows(load(FULL), texts)
    # A model may hold references to itself.
    gc.collect()
    half = load(HALF)
    least = _least_cosine(full, rows(half, texts))
    if least >= LEAST_COSINE:
        log.info("the model runs in %s: its vectors are those of %s at a least cosine of %.5f", HALF, FULL, least)
        return half, HALF
    log.warning("the model runs in %s: in %s the least cosine of its vectors is %.5f", FULL, HALF, least)
    del half
    gc.collect()
    return load(FULL), FULL


def _least_cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """Return the least cosine of two models' vectors, -1 if one of them is no vector."""
    import numpy as np

    wide, other = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1) * np.linalg.norm(other, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        least = float((np.einsum("ij,ij->i", wide, other) / norms).min())
    return least if np.isfinite(least) else -1.0
