"""Attention: RoPE, whole rows of packed segments, and rows that grow in a KV cache.

Implementations of attention over whole rows:
  xla        one softmax over [T, T] scores: the reference.
  blockwise  query blocks against the keys in front of them, computed again in the backward pass:
             half the products, a fraction of the memory (`rome.models.blockwise`). What CPUs use.
  cudnn      NVIDIA's fused kernel, through jax.nn.dot_product_attention.
  splash     the Pallas kernel of jax for TPUs.
"""

import chex
import jax
import jax.numpy as jnp

from rome.models.blockwise import blockwise_attention

_BY_BACKEND = {"cpu": "blockwise", "tpu": "splash"}


def rope_angles(
  positions_BxT: chex.Array, head_dim: int, theta: float
) -> tuple[chex.Array, chex.Array]:
  """Cosine and sine [B, T, 1, head_dim / 2] float32 of RoPE: computed once, used by every layer."""
  half = head_dim // 2
  freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BxT[..., None, None].astype(jnp.float32) * freq[None, None, None]
  return jnp.cos(angle), jnp.sin(angle)


def rope(x_BxTxNxH: chex.Array, angles: tuple[chex.Array, chex.Array]) -> chex.Array:
  """Rotary position embedding in float32, the half-split layout of Llama and Qwen."""
  x1, x2 = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
  cos, sin = angles
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
  if impl == "auto":
    impl = _BY_BACKEND.get(jax.default_backend(), "xla")
  if impl == "blockwise":
    return blockwise_attention(q_BxTxNxH, k_BxTxGxH, v_BxTxGxH, segment_ids_BxT)
  if impl == "splash":
    from rome.models import splash  # Pallas takes a while to import; only TPUs need it.

    return splash.splash_attention(q_BxTxNxH, k_BxTxGxH, v_BxTxGxH, segment_ids_BxT)
  t = q_BxTxNxH.shape[1]
  same = segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
  mask = (same & jnp.tril(jnp.ones((t, t), bool))[None])[:, None]
  return jax.nn.dot_product_attention(
    q_BxTxNxH, k_BxTxGxH, v_BxTxGxH, mask=mask, implementation="cudnn" if impl == "cudnn" else "xla"
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
