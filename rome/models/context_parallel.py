"""Attention on a mesh: each device its rows, its heads and, of split rows, its places.

Rows split over `context` attend in a ring: keys and values travel round the devices while each one
folds them into a running softmax, and once more in the backward pass, with their gradients. No
device ever holds the keys of a whole row, or more scores than a block of queries by half of its own
keys (Liu et al., "Ring Attention with Blockwise Transformers", arXiv:2310.01889).

A causal mask gives the last places of a row all the work and the first none. So for the time of the
attention each device swaps its places for a piece from the front of the row and the mirrored piece
from its back ("zig-zag"): all then have equal work in every round, two of four quarters, and the
other quarters are not computed. Elsewhere places stay in order.

Left out: a fused kernel inside the ring, and rounds saved where no segment crosses devices.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rome.models import sharding
from rome.models.attention import packed_attention

_BLOCK = 512  # queries, at most, whose scores exist at once
_NONE = -1e30  # a score that no softmax sees; finite, so that differences are


def attention(
  q_BxTxNxH: chex.Array,
  k_BxTxGxH: chex.Array,
  v_BxTxGxH: chex.Array,
  segment_ids_BxT: chex.Array,
  impl: str,
) -> chex.Array:
  """`attention.packed_attention` on the mesh in use: [B, T, N, H], split like the queries.

  Args:
    q_BxTxNxH: queries; N a multiple of G.
    k_BxTxGxH: keys.
    v_BxTxGxH: values.
    segment_ids_BxT: int32, 0 is padding.
    impl: static, what one device runs on whole rows; "auto" where rows are split.
  Raises:
    ValueError: `impl` names an implementation for whole rows, but rows are split.
  """
  if not sharding.in_use():
    return packed_attention(q_BxTxNxH, k_BxTxGxH, v_BxTxGxH, segment_ids_BxT, impl)
  if not sharding.mesh_axes("length"):
    run: Callable[..., chex.Array] = functools.partial(packed_attention, impl=impl)
  elif impl == "auto":
    run = _zigzag_ring
  else:
    raise ValueError(
      f"compute.attention={impl} needs whole rows, the mesh splits them over context: use auto"
    )
  q_spec = sharding.spec("batch", "length", "heads", None)
  kv_spec = sharding.spec("batch", "length", "kv_heads", None)
  ids_spec = sharding.spec("batch", "length")
  # Kernels say nothing of what varies over the mesh, hence no check_vma. Every argument with a
  # gradient is split over every axis in use, so that there is no sum to forget.
  return jax.shard_map(
    run, in_specs=(q_spec, kv_spec, kv_spec, ids_spec), out_specs=q_spec, check_vma=False
  )(q_BxTxNxH, k_BxTxGxH, v_BxTxGxH, segment_ids_BxT)


# --- the zig-zag ---------------------------------------------------------------------------------
# P = 2 pieces of S places on each device; R query heads a key head.


def _zigzag_ring(
  q_BxTxNxH: chex.Array, k_BxTxGxH: chex.Array, v_BxTxGxH: chex.Array, ids_BxT: chex.Array
) -> chex.Array:
  b, t, n, h = q_BxTxNxH.shape
  g, s = k_BxTxGxH.shape[2], t // 2
  places_T = jax.lax.axis_index("context") * t + jnp.arange(t)
  places_BxT = jnp.broadcast_to(places_T[None], (b, t))
  # In a scan over layers jax computes once, and keeps, what follows from segment ids and places
  # alone: the masks of all scores. Behind a barrier with the queries nothing does.
  q_BxTxNxH, ids_BxT, places_BxT = jax.lax.optimization_barrier((q_BxTxNxH, ids_BxT, places_BxT))

  def pieces(x: chex.Array) -> chex.Array:
    return _swap(jnp.moveaxis(x.reshape(b, 2, s, *x.shape[2:]), 1, 0))

  q, k, v = pieces(q_BxTxNxH), pieces(k_BxTxGxH), pieces(v_BxTxGxH)
  ids, places = pieces(ids_BxT), pieces(places_BxT)
  block = max(i for i in range(1, min(s, _BLOCK) + 1) if s % i == 0)
  # Blocks of queries [P * S / block, B, G, R, block, H], each with its segment ids and places.
  q = q.reshape(2, b, s // block, block, g, n // g, h).transpose(0, 2, 1, 4, 5, 3, 6)
  q = q.reshape(-1, *q.shape[2:])
  of_q = tuple(
    x.reshape(2, b, s // block, block).swapaxes(1, 2).reshape(-1, b, block) for x in (ids, places)
  )
  out = _ring(q, of_q, k, v, (ids, places))
  out = out.reshape(2, s // block, b, g, n // g, block, h).transpose(0, 2, 1, 5, 3, 4, 6)
  out = _swap(out.reshape(2, b, s, n, h), back=True)
  return jnp.moveaxis(out, 0, 1).reshape(b, t, n, h)


def routes(count: int) -> list[list[tuple[int, int]]]:
  """Where the two pieces of each of `count` devices go: (from, to) of first and of second pieces.

  Device i has pieces 2i and 2i + 1 of a row and is to have pieces i and 2 * count - 1 - i. Of each
  kind every device gets one, the front piece as its first or its second: places tell, not order.
  """

  def owner(piece: int) -> int:
    return min(piece, 2 * count - 1 - piece)

  return [[(i, owner(2 * i + kind)) for i in range(count)] for kind in (0, 1)]


def _swap(x_PxSxx: chex.Array, back: bool = False) -> chex.Array:
  moved = []
  for piece, route in zip(x_PxSxx, routes(jax.lax.axis_size("context")), strict=True):
    route = [(to, start) for start, to in route] if back else route
    moved.append(jax.lax.ppermute(piece, "context", route))
  return jnp.stack(moved)


# --- the ring ------------------------------------------------------------------------------------
# K blocks of Q queries; `of_q` and `of_kv` are their segment ids and places.


@jax.custom_vjp
def _ring(
  q_KxBxGxRxQxH: chex.Array,
  of_q: tuple,
  k_PxBxSxGxH: chex.Array,
  v_PxBxSxGxH: chex.Array,
  of_kv: tuple,
) -> chex.Array:
  return _ring_fwd(q_KxBxGxRxQxH, of_q, k_PxBxSxGxH, v_PxBxSxGxH, of_kv)[0]


def _next(tree: chex.ArrayTree) -> chex.ArrayTree:
  """Hands `tree` to the next device of the ring."""
  count = jax.lax.axis_size("context")
  return jax.lax.ppermute(tree, "context", [(i, (i + 1) % count) for i in range(count)])


def _scores(q: chex.Array, of_q: tuple, k_BxSxGxH: chex.Array, of_k: tuple) -> chex.Array:
  """Scores [B, G, R, Q, S] float32 of a block of queries and a piece of keys."""
  (q_ids, q_places), (k_ids, k_places) = of_q, of_k
  seen = (q_ids[:, :, None] == k_ids[:, None]) & (q_places[:, :, None] >= k_places[:, None])
  s = jnp.einsum("bgrqh,bsgh->bgrqs", q, k_BxSxGxH, preferred_element_type=jnp.float32)
  return jnp.where(seen[:, None, None], s * q.shape[-1] ** -0.5, _NONE)


def may_see(of_q: tuple, of_k: tuple) -> chex.Array:
  """Whether some of these queries stand behind some of these keys."""
  return jnp.max(of_q[1]) >= jnp.min(of_k[1])


def _ring_fwd(
  q_KxBxGxRxQxH: chex.Array,
  of_q: tuple,
  k_PxBxSxGxH: chex.Array,
  v_PxBxSxGxH: chex.Array,
  of_kv: tuple,
) -> tuple[chex.Array, tuple]:
  def fold(
    state: tuple, q: chex.Array, of_q: tuple, k: chex.Array, v: chex.Array, of_k: tuple
  ) -> tuple:
    out, top, total = state
    s = _scores(q, of_q, k, of_k)
    # A query that has seen no key yet sums garbage, which its first key scales by exp(-1e30) = 0.
    new_top = jnp.maximum(top, s.max(-1))
    p, keep = jnp.exp(s - new_top[..., None]), jnp.exp(top - new_top)
    more = jnp.einsum("bgrqs,bsgh->bgrqh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out * keep[..., None] + more, new_top, total * keep + p.sum(-1)

  def round_(carry: tuple, _: None) -> tuple[tuple, None]:
    kv, states = carry

    def block(z: tuple) -> tuple:
      state, q, of_q = z
      for k, v, of_k in _pieces(kv):
        run = functools.partial(fold, q=q, of_q=of_q, k=k, v=v, of_k=of_k)
        state = jax.lax.cond(may_see(of_q, of_k), run, lambda x: x, state)
      return state

    return (_next(kv), jax.lax.map(block, (states, q_KxBxGxRxQxH, of_q))), None

  zeros = jnp.zeros(q_KxBxGxRxQxH.shape, jnp.float32)
  states = (zeros, jnp.full(zeros.shape[:-1], _NONE), zeros[..., 0])
  kv = (k_PxBxSxGxH, v_PxBxSxGxH, of_kv)
  (_, (out, top, total)), _ = jax.lax.scan(
    round_, (kv, states), length=jax.lax.axis_size("context")
  )
  out = (out / total[..., None]).astype(q_KxBxGxRxQxH.dtype)
  return out, (q_KxBxGxRxQxH, of_q, *kv, out, top + jnp.log(total))


def _pieces(kv: tuple) -> list[tuple]:
  return [jax.tree.map(lambda x, i=i: x[i], kv) for i in (0, 1)]


def _ring_bwd(kept: tuple, grad: chex.Array) -> tuple:
  q, of_q, k, v, of_kv, out, lse = kept
  inner = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), -1)
  scale = q.shape[-1] ** -0.5

  def unfold(grads: tuple, z: tuple, k: chex.Array, v: chex.Array, of_k: tuple) -> tuple:
    dq, dk, dv = grads
    q, of_q, g, lse, inner = z
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    p = jnp.exp(_scores(q, of_q, k, of_k) - lse[..., None])
    ds = p * (dot("bgrqh,bsgh->bgrqs", g, v) - inner[..., None]) * scale
    p, ds = p.astype(v.dtype), ds.astype(k.dtype)
    dq = dq + dot("bgrqs,bsgh->bgrqh", ds, k)
    return dq, dk + dot("bgrqs,bgrqh->bsgh", ds, q), dv + dot("bgrqs,bgrqh->bsgh", p, g)

  def round_(carry: tuple, _: None) -> tuple[tuple, None]:
    kv, dkv, dq = carry

    def block(dkv: tuple, xs: tuple) -> tuple[tuple, chex.Array]:
      dq, z = xs
      grown = []
      for (k, v, of_k), (dk, dv) in zip(_pieces(kv), _pieces(dkv), strict=True):
        run = functools.partial(unfold, z=z, k=k, v=v, of_k=of_k)
        dq, dk, dv = jax.lax.cond(may_see(z[1], of_k), run, lambda x: x, (dq, dk, dv))
        grown.append((dk, dv))
      return jax.tree.map(lambda *x: jnp.stack(x), *grown), dq

    dkv, dq = jax.lax.scan(block, dkv, (dq, (q, of_q, grad, lse, inner)))
    return (*_next((kv, dkv)), dq), None

  zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
  carry = ((k, v, of_kv), (zeros(k), zeros(v)), zeros(q))
  # After a whole round the gradients of keys and values are back where those live.
  (_, (dk, dv), dq), _ = jax.lax.scan(round_, carry, length=jax.lax.axis_size("context"))
  return dq.astype(q.dtype), None, dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_fwd, _ring_bwd)
