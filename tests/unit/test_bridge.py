"""The map between two models' vectors."""

from __future__ import annotations

import numpy as np
import pytest

from embedline.core.vectors import FloatMatrix, normalise
from embedline.gate.model_bridge import fit_bridge, procrustes

SEEDS = range(20)


def _texts(random: np.random.Generator, count: int, dimensions: int) -> FloatMatrix:
    return normalise(random.normal(size=(count, dimensions)).astype(np.float32))


def _semi_orthogonal(random: np.random.Generator, rows: int, columns: int) -> FloatMatrix:
    size = max(rows, columns)
    return np.linalg.qr(random.normal(size=(size, size)))[0][:rows, :columns].astype(np.float32)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("old", "new"), [(24, 24), (16, 24)])
def test_a_known_rotation_is_found(seed: int, old: int, new: int) -> None:
    random = np.random.default_rng(seed)
    vectors, rotation = _texts(random, 200, old), _semi_orthogonal(random, old, new)
    bridge = fit_bridge(vectors, vectors @ rotation, seed)
    assert np.abs(bridge.rotation - rotation).max() < 1e-5
    assert bridge.held_out_cosine == pytest.approx(1, abs=1e-5)
    assert bridge.pairs == 200
    fresh = _texts(random, 5, old)
    assert np.abs(bridge.map(fresh) - fresh @ rotation).max() < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_into_fewer_dimensions_it_finds_what_was_rotated_into_them(seed: int) -> None:
    random = np.random.default_rng(seed)
    narrow, rotation = _texts(random, 300, 12), _semi_orthogonal(random, 12, 30)
    bridge = fit_bridge(narrow @ rotation, narrow, seed)
    assert bridge.rotation.shape == (30, 12)
    assert bridge.held_out_cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("old", "new"), [(24, 24), (16, 24), (24, 16)])
def test_the_map_is_orthogonal(old: int, new: int) -> None:
    random = np.random.default_rng(1)
    rotation = procrustes(_texts(random, 100, old), _texts(random, 100, new))
    square = rotation @ rotation.T if old <= new else rotation.T @ rotation
    assert np.abs(square - np.eye(min(old, new))).max() < 1e-5


def test_lengths_do_not_matter() -> None:
    random = np.random.default_rng(2)
    vectors, rotation = _texts(random, 100, 8), _semi_orthogonal(random, 8, 8)
    scaled = vectors * random.uniform(0.5, 9, size=(100, 1)).astype(np.float32)
    assert np.abs(fit_bridge(scaled, vectors @ rotation).rotation - rotation).max() < 1e-5


def test_unrelated_models_have_no_bridge() -> None:
    random = np.random.default_rng(3)
    bridge = fit_bridge(_texts(random, 2000, 32), _texts(random, 2000, 32))
    # Fitted pairs would say more than 0.1: only those held out tell.
    assert abs(bridge.held_out_cosine) < 0.05


def test_more_noise_is_a_poorer_map() -> None:
    random = np.random.default_rng(4)
    vectors, rotation = _texts(random, 1000, 32), _semi_orthogonal(random, 32, 32)
    cosines = [
        fit_bridge(vectors, normalise(vectors @ rotation + noise * _texts(random, 1000, 32))).held_out_cosine
        for noise in (0.0, 0.5, 1.0, 4.0)
    ]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[2] == pytest.approx(0.7, abs=0.05)


def test_what_a_narrow_space_loses_stays_zero() -> None:
    random = np.random.default_rng(5)
    old = np.zeros((40, 4), dtype=np.float32)
    old[:, :2] = random.normal(size=(40, 2))
    bridge = fit_bridge(old, old[:, :2])
    assert bridge.map(np.array([[0, 0, 0, 1]], dtype=np.float32)) == pytest.approx(0)


def test_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 10"):
        fit_bridge(np.ones((9, 3), np.float32), np.ones((9, 3), np.float32))
