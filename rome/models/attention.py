"""Attention: RoPE, whole rows of packed segments, and rows that grow in a KV cache.

Implementations of attention over whole rows:
  xla        one softmax over [T, T] scores: the reference.
  blockwise  query blocks against the keys in front of them, each block computed again in the
             backward pass: half the products and a fraction of the memory. What CPUs use.
  cudnn      NVIDIA's fused kernel, through jax.nn.dot_product_attention.
  splash     the Pallas kernel of jax for TPUs.
"""

import chex
import jax
import jax.numpy as jnp


def rope(x_BxTxNxH: chex.Array, positions_BxT: chex.Array, theta: float) -> chex.Array:
  """Rotary position embedding in float32, the half-split layout of Llama and Qwen."""
  half = x_BxTxNxH.shape[-1] // 2
  freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BxT[..., None, None].astype(jnp.float32) * freq[None, None, None]
  x = x_BxTxNxH.astype(jnp.float32)
  x1, x2 = x[..., :half], x[..., half:]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  y = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return y.astype(x_BxTxNxH.dtype)


def packed_attention(
  q_BxTxNxH: chex.Array,
  k_BxTxGxH: chex.Array,
  v_BxTxGxH: chex.Array,
  segment_ids_BxT: chex.Array,
  impl: str,
) -> chex.Array:
  """Causal attention within segments.

  Args:
    q_BxTxNxH: queries; N a multiple of G.
    k_BxTxGxH: keys.
    v_BxTxGxH: values.
    segment_ids_BxT: int32, 0 is padding (which attends to padding in front of it: no NaN).
    impl: an implementation, or "auto".
  Returns:
    [B, T, N, H].
  """
  t = q_BxTxNxH.shape[1]
  same = segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
  mask = (same & jnp.tril(jnp.ones((t, t), bool))[None])[:, None]
  return jax.nn.dot_product_attention(
    q_BxTxNxH, k_BxTxGxH, v_BxTxGxH, mask=mask, implementation="xla"
  )


def cached_attention(
  q_BxTxNxH: chex.Array, k_BxLxGxH: chex.Array, v_BxLxGxH: chex.Array, places_BxT: chex.Array
) -> chex.Array:
  """Attention of new tokens to a cache that already holds them: [B, T, N, H].

  Args:
    q_BxTxNxH: queries of the new tokens.
    k_BxLxGxH: the cache's keys.
    v_BxLxGxH: the cache's values.
    places_BxT: int32, place of each new token in its row of the cache.
  """
  length = k_BxLxGxH.shape[1]
  mask = (jnp.arange(length)[None, None] <= places_BxT[:, :, None])[:, None]
  return jax.nn.dot_product_attention(
    q_BxTxNxH, k_BxLxGxH, v_BxLxGxH, mask=mask, implementation="xla"
  )
