"""The TPU kernels, interpreted, against a loop over groups in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import experts
from rome.models.megablox import grouped_matmul


# Empty groups, rows behind the last group, and sizes that fill no tile.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("rows", "inputs", "outputs", "sizes"),
  [(24, 16, 32, [5, 0, 9, 3]), (1100, 128, 64, [300, 0, 700, 100]), (40, 1100, 8, [0, 39, 1])],
)
def test_values_and_gradients(rows, inputs, outputs, sizes):
  rng = np.random.default_rng(rows)
  x = rng.normal(size=(rows, inputs))
  w = rng.normal(size=(len(sizes), inputs, outputs))
  g = rng.normal(size=(rows, outputs))
  y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
  for e, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
    group = slice(end - size, end)
    y[group], dx[group], dw[e] = x[group] @ w[e], g[group] @ w[e].T, x[group].T @ g[group]

  @jax.jit
  def run(x, w, g):
    value, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes), True), x, w)
    return value, *pull(g)

  # Rows behind the last group may hold anything, on the way in and on the way back.
  x[sum(sizes) :], g[sum(sizes) :] = np.nan, np.nan
  got = run(*(jnp.asarray(a, jnp.float32) for a in (x, w, g)))
  for a, b in zip(got, (y, dx, dw), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-3 if inputs > 1000 else 3e-4)


def test_as_the_product_of_the_experts():
  rng = np.random.default_rng(7)
  x, gate_up, down = (
    jnp.asarray(rng.normal(size=size), jnp.float32) for size in [(20, 16), (4, 16, 24), (4, 12, 16)]
  )
  chosen = jnp.asarray(rng.integers(0, 3, (20, 2)), jnp.int32)  # nobody wants the last expert
  weights = jnp.asarray(rng.uniform(size=(20, 2)), jnp.float32)

  def matmul(x, w, sizes):
    return grouped_matmul(x, w, sizes, True)

  got = jax.jit(lambda *a: experts.experts_ragged(*a, matmul))(x, weights, chosen, gate_up, down)
  want = jax.jit(experts.experts_dense)(x, weights, chosen, gate_up, down)
  np.testing.assert_allclose(got, want, atol=1e-4)
