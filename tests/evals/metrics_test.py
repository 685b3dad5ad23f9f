"""Intervals: hand-computed values, exact ends, coverage."""

import math

import numpy as np
import pytest

from rome.evals import metrics


@pytest.mark.parametrize(
  "successes, n, low, high",
  [
    # Roots of (p - rate)^2 = z^2 p (1 - p) / n, worked out by hand from the quadratic.
    (0, 10, 0.0, 0.277533),
    (10, 10, 0.722467, 1.0),
    (5, 10, 0.236593, 0.763407),
    (90, 100, 0.825635, 0.944771),
  ],
)
def test_wilson_values(successes, n, low, high):
  np.testing.assert_allclose(metrics.wilson_interval(successes, n), (low, high), atol=1e-6)


@pytest.mark.parametrize("successes, n", [(1, 3), (120, 200), (199, 200)])
def test_wilson_ends_solve_the_score_equation(successes, n):
  for p in metrics.wilson_interval(successes, n):
    distance = abs(p - successes / n)
    assert distance == pytest.approx(metrics.Z_95 * math.sqrt(p * (1 - p) / n), rel=1e-9)


def test_wilson_covers_the_true_rate():
  rng = np.random.default_rng(0)
  covered = [
    low <= 0.9 <= high
    for low, high in (metrics.wilson_interval(int(k), 200) for k in rng.binomial(200, 0.9, 2000))
  ]
  assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize("successes, n", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
  with pytest.raises(ValueError, match=f"{successes} of {n}"):
    metrics.wilson_interval(successes, n)
