"""Causal attention in blocks of queries, for CPUs: each block meets the keys in front of it only.

Half the products of the plain form, scores of one block at a time, and a backward pass that
computes probabilities again from their log-sum-exp instead of keeping them (as FlashAttention does,
arXiv:2205.14135). Blocks are unrolled, so that shapes are static; rows longer than `_MOST` blocks
get larger ones. Within a block the query heads of one key head stand below each other, so that
every product is one plain batched matrix product: other layouts of the same einsum are up to five
times slower on CPUs.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

_BLOCK = 128  # queries a block, where a row has at most _MOST blocks
_MOST = 32
_MASKED = -1e30  # finite: a row that is masked everywhere stays free of NaN


class _Shape(NamedTuple):
  """B rows of T queries, G key heads with R query heads each, blocks of Q queries."""

  b: int
  t: int
  g: int
  r: int
  q: int

  @property
  def blocks(self) -> int:
    return self.t // self.q


def _split(x_BxTxNxH: chex.Array, s: _Shape) -> chex.Array:
  """[T / Q, B * G, R * Q, H]."""
  x = x_BxTxNxH.reshape(s.b, s.blocks, s.q, s.g, s.r, -1).transpose(1, 0, 3, 4, 2, 5)
  return x.reshape(s.blocks, s.b * s.g, s.r * s.q, -1)


def _join(x: chex.Array, s: _Shape) -> chex.Array:
  """The inverse of `_split`."""
  x = x.reshape(s.blocks, s.b, s.g, s.r, s.q, -1).transpose(1, 0, 4, 2, 3, 5)
  return x.reshape(s.b, s.t, s.g * s.r, -1)


def _heads_first(x_BxTxGxH: chex.Array) -> chex.Array:
  b, t, g, h = x_BxTxGxH.shape
  return x_BxTxGxH.transpose(0, 2, 1, 3).reshape(b * g, t, h)


def _mask(segment_ids_BxT: chex.Array, i: int, s: _Shape) -> chex.Array:
  """Which keys [B * G, R * Q, (i + 1) * Q] the queries of block i see."""
  first, end = i * s.q, (i + 1) * s.q
  query, key = segment_ids_BxT[:, first:end, None], segment_ids_BxT[:, None, :end]
  causal = jnp.arange(first, end)[:, None] >= jnp.arange(end)[None]
  seen = ((query == key) & causal[None])[:, None, None]
  return jnp.broadcast_to(seen, (s.b, s.g, s.r, s.q, end)).reshape(s.b * s.g, s.r * s.q, end)


def _scores(q: chex.Array, k: chex.Array) -> chex.Array:
  return jnp.einsum("xmh,xsh->xms", q, k, preferred_element_type=jnp.float32)


def _block_fwd(q: chex.Array, k: chex.Array, v: chex.Array, mask: chex.Array) -> tuple:
  """Output [X, M, H] and log-sum-exp [X, M, 1] of one block."""
  scores = jnp.where(mask, _scores(q, k), _MASKED)
  top = scores.max(axis=-1, keepdims=True)
  p = jnp.exp(scores - top)
  total = p.sum(axis=-1, keepdims=True)
  y = jnp.einsum("xms,xsh->xmh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return (y / total).astype(v.dtype), top + jnp.log(total)


def _block_bwd(
  q: chex.Array,
  k: chex.Array,
  v: chex.Array,
  mask: chex.Array,
  lse: chex.Array,
  dy: chex.Array,
  delta: chex.Array,
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Gradients of q [X, M, H], of k and of v, the latter two transposed: [X, H, S]."""
  p = jnp.where(mask, jnp.exp(_scores(q, k) - lse), 0.0)
  ds = (p * (_scores(dy, v) - delta)).astype(q.dtype)
  swap = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
  # The barrier keeps the transpose a copy of its own: fused into the product it is slow.
  turned = jax.lax.optimization_barrier((swap(q), swap(dy)))
  dk, dv = (
    jnp.einsum("xhm,xms->xhs", a, b, preferred_element_type=jnp.float32)
    for a, b in zip(turned, (ds, p.astype(q.dtype)), strict=True)
  )
  return jnp.einsum("xms,xsh->xmh", ds, k), dk, dv


def _attend_fwd(
  shape: _Shape, q: chex.Array, k: chex.Array, v: chex.Array, segment_ids_BxT: chex.Array
) -> tuple[chex.Array, tuple]:
  s, ys, lses = shape, [], []
  q, k, v = _split(q, s), _heads_first(k), _heads_first(v)
  for i in range(s.blocks):
    end = (i + 1) * s.q
    y, lse = _block_fwd(q[i], k[:, :end], v[:, :end], _mask(segment_ids_BxT, i, s))
    ys.append(y)
    lses.append(lse)
  y = jnp.stack(ys)
  return _join(y, s), (q, k, v, segment_ids_BxT, y, jnp.stack(lses))


def _attend_bwd(shape: _Shape, kept: tuple, dy_BxTxNxH: chex.Array) -> tuple:
  s, (q, k, v, segment_ids_BxT, y, lse) = shape, kept
  dy = _split(dy_BxTxNxH, s)
  delta = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1, keepdims=True)
  dk, dv = (jnp.zeros((x.shape[0], x.shape[2], s.t), jnp.float32) for x in (k, v))
  dqs = []
  for i in range(s.blocks):
    end, mask = (i + 1) * s.q, _mask(segment_ids_BxT, i, s)
    dq, dk_i, dv_i = _block_bwd(q[i], k[:, :end], v[:, :end], mask, lse[i], dy[i], delta[i])
    dqs.append(dq)
    dk, dv = dk.at[:, :, :end].add(dk_i), dv.at[:, :, :end].add(dv_i)

  def back(x: chex.Array) -> chex.Array:
    return x.reshape(s.b, s.g, -1, s.t).transpose(0, 3, 1, 2).astype(k.dtype)

  return _join(jnp.stack(dqs), s), back(dk), back(dv), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  shape: _Shape, q: chex.Array, k: chex.Array, v: chex.Array, segment_ids_BxT: chex.Array
) -> chex.Array:
  return _attend_fwd(shape, q, k, v, segment_ids_BxT)[0]


_attend.defvjp(_attend_fwd, _attend_bwd)


def blockwise_attention(
  q_BxTxNxH: chex.Array,
  k_BxTxGxH: chex.Array,
  v_BxTxGxH: chex.Array,
  segment_ids_BxT: chex.Array,
) -> chex.Array:
  """Causal attention within segments; see `attention.packed_attention`."""
  b, t, n, h = q_BxTxNxH.shape
  g = k_BxTxGxH.shape[2]
  block = min(_BLOCK * -(-t // (_BLOCK * _MOST)), t)
  # Padding at the end is a segment of its own, which nothing before it sees.
  pad = -t % block
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    for x in (q_BxTxNxH * h**-0.5, k_BxTxGxH, v_BxTxGxH)
  )
  segments = jnp.pad(segment_ids_BxT, ((0, 0), (0, pad)), constant_values=-1)
  return _attend(_Shape(b, t + pad, g, n // g, block), q, k, v, segments)[:, :t]
