"""Map the vectors of one model to those of another.

With the map a new model can be judged before all texts are embedded with it. The map is orthogonal: it turns and
mirrors, and does not change which vectors are near. It fits as far as both models arrange the texts alike. `fit_bridge`
measures that on texts that it was not fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedline.core.vectors import FloatMatrix, normalise

# One pair in this many is kept from the fit to measure it.
_HELD_OUT = 5
_FEWEST_PAIRS = 10


@dataclass(frozen=True)
class Bridge:
    """The map and its quality.

    `rotation` has the shape (old dimensions, new dimensions). `held_out_cosine` is the mean cosine that held-out pairs
    reach with it: 1 for a perfect map, 0 for unrelated vectors. `pairs` were used for the fit.
    """

    rotation: npt.NDArray[np.float32]
    held_out_cosine: float
    pairs: int

    def map(self, old: FloatMatrix) -> FloatMatrix:
        """Return the old version's vectors as the new one's, of length 1."""
        mapped: FloatMatrix = (old @ self.rotation).astype(np.float32)
        # If a narrower space keeps nothing of a vector, it stays zero and is near to no query.
        norms = np.linalg.norm(mapped, axis=1, keepdims=True)
        unit: FloatMatrix = (mapped / np.where(norms > 0, norms, 1)).astype(np.float32)
        return unit


def fit_bridge(old: FloatMatrix, new: FloatMatrix, seed: int = 0) -> Bridge:
    """Fit the map from old vectors to new vectors of the same texts.

    Shapes are (pairs, old dimensions) and (pairs, new dimensions). A fifth of the pairs, chosen by the seed, measures
    the map that the others give; the map returned is of all of them. Raises ValueError for fewer than ten pairs.
    """
    if len(old) != len(new) or len(old) < _FEWEST_PAIRS:
        raise ValueError(f"a bridge needs at least {_FEWEST_PAIRS} texts with vectors of both versions")
    before, after = normalise(old), normalise(new)
    is_held_out = np.zeros(len(before), dtype=bool)
    is_held_out[np.random.default_rng(seed).permutation(len(before))[: len(before) // _HELD_OUT]] = True
    trial = Bridge(procrustes(before[~is_held_out], after[~is_held_out]), 0.0, 0)
    cosines = np.einsum("ij,ij->i", trial.map(before[is_held_out]), after[is_held_out])
    return Bridge(procrustes(before, after), float(cosines.mean()), len(before))


def procrustes(old: FloatMatrix, new: FloatMatrix) -> npt.NDArray[np.float32]:
    """Return the orthogonal map W with the largest mean cosine of old @ W and new.

    Its shape is (old dimensions, new dimensions). W = U V' of the singular value decomposition old' new = U S V':
    Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31 (1966). Between spaces
    of different dimensions W is semi-orthogonal: into the larger one it keeps all distances, into the smaller one it
    projects.
    """
    left, _, right = np.linalg.svd(old.T.astype(np.float64) @ new.astype(np.float64), full_matrices=False)
    rotation: npt.NDArray[np.float32] = (left @ right).astype(np.float32)
    return rotation
