"""Attention over whole rows: every implementation is the definition, and blocks change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import attention, blockwise

B, N, G, H = 2, 4, 2, 6


def draw(t, seed=0):
  """q, k, v and segment ids with two segments and padding in a row."""
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, t, heads, H)).astype(np.float32) for heads in (N, G, G))
  cuts = np.stack([np.arange(t) * 3 // t + 1, np.ones(t, int)]).astype(np.int32)
  cuts[0, -(t // 5) :] = 0
  return q, k, v, cuts


def definition(q, k, v, segments):
  """Loops in float64."""
  out = np.zeros(q.shape)
  for b, i, n in np.ndindex(q.shape[:3]):
    seen = (np.arange(q.shape[1]) <= i) & (segments[b] == segments[b, i])
    scores = k[b, :, n // (N // G)].astype(np.float64) @ q[b, i, n] / np.sqrt(H)
    p = np.where(seen, np.exp(scores - scores[seen].max()), 0.0)
    out[b, i, n] = p @ v[b, :, n // (N // G)] / p.sum()
  return out


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["xla", "blockwise", "auto"])
@pytest.mark.parametrize("block", [5, 8, 64])
def test_every_implementation_is_the_definition(monkeypatch, impl, block):
  monkeypatch.setattr(blockwise, "_BLOCK", block)
  arrays = draw(23)  # no multiple of a block; 64 is more than the row
  got = attention.packed_attention(*map(jnp.asarray, arrays), impl)
  np.testing.assert_allclose(got, definition(*arrays), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("block", [5, 64])
def test_gradients_are_those_of_the_plain_form(monkeypatch, block):
  monkeypatch.setattr(blockwise, "_BLOCK", block)
  *arrays, segments = draw(23)
  direction = jnp.cos(jnp.arange(B * 23 * N * H, dtype=jnp.float32)).reshape(B, 23, N, H)

  def gradients(impl):
    def loss(q, k, v):
      return (attention.packed_attention(q, k, v, segments, impl) * direction).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

  for name, a, b in zip("qkv", gradients("blockwise"), gradients("xla"), strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_long_rows_get_larger_blocks():
  """At most _MOST blocks, so that a program's length does not follow the row's."""

  def products(t):
    shapes = [jax.ShapeDtypeStruct((1, t, heads, H), jnp.float32) for heads in (N, G, G)]
    shapes.append(jax.ShapeDtypeStruct((1, t), jnp.int32))
    text = str(jax.make_jaxpr(blockwise.blockwise_attention)(*shapes))
    return text.count("dot_general")

  most = 2 * blockwise._MOST
  assert products(128) == 2 and products(129) == 4
  assert products(128 * blockwise._MOST) == most and products(40_000) <= most


@pytest.mark.slow
def test_bfloat16_stays_bfloat16_and_sums_in_float32():
  q, k, v, segments = draw(16)
  want = definition(q, k, v, segments)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  got = attention.packed_attention(*half, jnp.asarray(segments), "blockwise")
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.05)
