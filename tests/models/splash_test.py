"""The TPU kernel, interpreted, against one softmax over all scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models.attention import packed_attention
from rome.models.splash import splash_attention


@pytest.mark.slow
# Widths and lengths that fill a block, or do not; one that needs two blocks.
@pytest.mark.parametrize(
  ("length", "heads", "groups", "width"), [(100, 4, 2, 32), (128, 2, 1, 128), (700, 2, 2, 16)]
)
def test_values_and_gradients(length, heads, groups, width):
  rng = np.random.default_rng(length)
  q, k, v = (
    jnp.asarray(rng.normal(size=(2, length, n, width)), jnp.float32)
    for n in (heads, groups, groups)
  )
  ids = jnp.asarray(np.sort(rng.integers(1, 4, (2, length)), axis=1), jnp.int32)
  ids = ids.at[:, -5:].set(0)
  weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32) * (ids > 0)[:, :, None, None]

  def grads(attend):
    return jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v) * weight), (0, 1, 2)))(q, k, v)

  def splash(q, k, v):
    return splash_attention(q, k, v, ids, interpret=True)

  def reference(q, k, v):
    return packed_attention(q, k, v, ids, "xla")

  got, want = jax.jit(splash)(q, k, v), jax.jit(reference)(q, k, v)
  np.testing.assert_allclose(got, want, atol=1e-5)
  for a, b in zip(grads(splash), grads(reference), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
