"""The experts of a sparse layer: SwiGLU on the chosen experts, dropless.

Implementations, equal up to rounding:
  dense   every expert on every token. A token's bits depend on that token alone, which is why
          generation uses it; also the oracle of the others.
  padded  a fixed number of slots an expert, one batched product a projection; what overflows
          follows in blocks. Work is proportional to the chosen experts: what CPUs train with.
  ragged  sorts token copies by expert; `jax.lax.ragged_dot`. What GPUs train with; on CPU it
          computes every expert.
  megablox  the same with Pallas kernels, see `rome.models.megablox`. What TPUs train with.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import struct

_BLOCK = 128  # rows of a block beyond the slots


def _num_slots(copies: int, num_experts: int) -> int:
  """An eighth more than an even share, in whole eights."""
  return -(-copies * 9 // (num_experts * 64)) * 8


def _activate(h: chex.Array) -> chex.Array:
  gate, up = jnp.split(h, 2, axis=-1)
  return jax.nn.silu(gate) * up


def _swiglu(x_GxMxD: chex.Array, gate_up_GxDx2F: chex.Array, down_GxFxD: chex.Array) -> chex.Array:
  """SwiGLU of a batch of experts: [G, M, D]; the first half of `gate_up` is the gate."""
  h = jnp.einsum("gmd,gdf->gmf", x_GxMxD, gate_up_GxDx2F)
  return jnp.einsum("gmf,gfd->gmd", _activate(h), down_GxFxD)


def experts_dense(
  x_NxD: chex.Array,
  weights_NxK: chex.Array,
  experts_NxK: chex.Array,
  gate_up_ExDx2F: chex.Array,
  down_ExFxD: chex.Array,
) -> chex.Array:
  """All experts on all tokens, weighted by the router: [N, D]."""
  num_experts = down_ExFxD.shape[0]
  y_ExNxD = _swiglu(
    jnp.broadcast_to(x_NxD, (num_experts, *x_NxD.shape)), gate_up_ExDx2F, down_ExFxD
  )
  share_NxE = jnp.sum(jax.nn.one_hot(experts_NxK, num_experts) * weights_NxK[..., None], axis=1)
  return jnp.einsum("end,ne->nd", y_ExNxD, share_NxE.astype(y_ExNxD.dtype))


@jax.custom_vjp
def _permute(rows_RxD: chex.Array, source_S: chex.Array, target_R: chex.Array) -> chex.Array:
  """rows[source], zeros where source == R.

  `target` is the inverse map: the backward pass is a gather too, not a scatter.
  """
  return jnp.take(rows_RxD, source_S, axis=0, mode="fill", fill_value=0)


def _permute_fwd(
  rows_RxD: chex.Array, source_S: chex.Array, target_R: chex.Array
) -> tuple[chex.Array, chex.Array]:
  return _permute(rows_RxD, source_S, target_R), target_R


def _permute_bwd(target_R: chex.Array, grad_SxD: chex.Array) -> tuple[chex.Array, None, None]:
  return jnp.take(grad_SxD, target_R, axis=0, mode="fill", fill_value=0), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


@struct.dataclass
class _Slots:
  """Where each token copy is computed. A copy is n * K + k; N * K stands for none.

  Attributes:
    copy_ExC: [E, C] int32, the copy in each slot of each expert.
    slot_NK: [N * K] int32, the slot e * C + c of each copy; E * C for those beyond the slots.
    order_NK: [N * K] int32, copies sorted by expert.
    first_E: [E] int32, where an expert's copies begin in that order.
    sizes_E: [E] int32, how many there are.
    blocks_E: [E] int32, blocks of copies beyond the slots, summed up to and with each expert.
  """

  copy_ExC: chex.Array
  slot_NK: chex.Array
  order_NK: chex.Array
  first_E: chex.Array
  sizes_E: chex.Array
  blocks_E: chex.Array


def _assign(experts_NxK: chex.Array, num_experts: int, slots: int) -> _Slots:
  copies = experts_NxK.size
  flat = experts_NxK.reshape(-1)
  iota = jax.lax.iota(jnp.int32, copies)
  sorted_expert, order = jax.lax.sort((flat, iota), num_keys=1)
  sizes = jnp.sum(jax.nn.one_hot(flat, num_experts, dtype=jnp.int32), axis=0)
  first = jnp.cumsum(sizes) - sizes
  rank = iota - jnp.take(first, sorted_expert, mode="clip")
  inside = (rank < slots) & (sorted_expert < num_experts)
  sorted_slot = jnp.where(inside, sorted_expert * slots + rank, num_experts * slots)
  column = jnp.arange(slots)[None]
  copy = jnp.take(order, first[:, None] + column, mode="clip")
  return _Slots(
    copy_ExC=jnp.where(column < sizes[:, None], copy, copies),
    slot_NK=jnp.zeros(copies, jnp.int32).at[order].set(sorted_slot, unique_indices=True),
    order_NK=order,
    first_E=first,
    sizes_E=sizes,
    blocks_E=jnp.cumsum(-(-jnp.maximum(sizes - slots, 0) // _BLOCK)),
  )


def _block(at: _Slots, j: chex.Array) -> tuple[chex.Array, chex.Array]:
  """Expert and copies [_BLOCK] of the j-th block beyond the slots."""
  expert = jnp.searchsorted(at.blocks_E, j, side="right")
  before = jnp.where(expert > 0, at.blocks_E[expert - 1], 0)
  rank = at.copy_ExC.shape[1] + (j - before) * _BLOCK + jnp.arange(_BLOCK)
  copy = jnp.take(at.order_NK, at.first_E[expert] + rank, mode="clip")
  return expert, jnp.where(rank < at.sizes_E[expert], copy, at.order_NK.size)


def _rows(x_NxD: chex.Array, copy: chex.Array, k: int) -> chex.Array:
  return jnp.take(x_NxD, copy // k, axis=0, mode="fill", fill_value=0)


def _silu_and_slope(gate: chex.Array) -> tuple[chex.Array, chex.Array]:
  s = jax.nn.sigmoid(gate)
  return gate * s, s + gate * s * (1 - s)


def _gradients(
  x: chex.Array,
  h: chex.Array,
  weight: chex.Array,
  dy: chex.Array,
  gate_up: chex.Array,
  down: chex.Array,
) -> tuple[chex.Array, chex.Array, chex.Array, chex.Array]:
  """Backward pass of rows [..., C, D] of one expert, or of a batch of experts.

  Args:
    x, h: the rows and their products with `gate_up`.
    weight: [..., C, 1], the router's.
    dy: [..., C, D], of the weighted output.
    gate_up, down: [..., D, 2F] and [..., F, D].
  Returns:
    Gradients of x, of the weight [..., C], of gate_up and of down.
  """
  dact = jnp.einsum("...cd,...fd->...cf", dy, down)
  # Gate and up side by side in one elementwise pass: a concatenation costs as much as a product.
  h2 = h.reshape(*h.shape[:-1], 2, -1)
  gate, up = h2[..., :1, :], h2[..., 1:, :]
  silu, slope = _silu_and_slope(gate)
  is_gate = jax.lax.broadcasted_iota(jnp.int32, h2.shape, h2.ndim - 2) == 0
  dh = (jnp.where(is_gate, up * slope, silu) * (dact * weight)[..., None, :]).reshape(h.shape)
  act = (silu * up)[..., 0, :]
  return (
    jnp.einsum("...cf,...df->...cd", dh, gate_up),
    jnp.sum(act * dact, axis=-1),
    jnp.einsum("...cd,...cf->...df", x, dh),
    jnp.einsum("...cf,...cd->...fd", act * weight, dy),
  )


def _padded_fwd(
  x_NxD: chex.Array,
  weights_NxK: chex.Array,
  experts_NxK: chex.Array,
  gate_up_ExDx2F: chex.Array,
  down_ExFxD: chex.Array,
) -> tuple[chex.Array, tuple]:
  (n, k), num_experts = experts_NxK.shape, down_ExFxD.shape[0]
  slots = _num_slots(n * k, num_experts)
  at = _assign(experts_NxK, num_experts, slots)
  flat_weights = weights_NxK.astype(x_NxD.dtype).reshape(-1)
  h = jnp.einsum("ecd,edf->ecf", _rows(x_NxD, at.copy_ExC, k), gate_up_ExDx2F)
  y = jnp.einsum("ecf,efd->ecd", _activate(h), down_ExFxD).reshape(num_experts * slots, -1)
  y = jnp.take(y, at.slot_NK, axis=0, mode="fill", fill_value=0).reshape(n, k, -1)
  out = jnp.einsum("nkd,nk->nd", y, flat_weights.reshape(n, k))

  def more(j: chex.Array, out_NxD: chex.Array) -> chex.Array:
    e, copy = _block(at, j)
    y = _activate(_rows(x_NxD, copy, k) @ gate_up_ExDx2F[e]) @ down_ExFxD[e]
    y = y * jnp.take(flat_weights, copy, mode="fill", fill_value=0)[:, None]
    return out_NxD.at[copy // k].add(y, mode="drop")

  out = jax.lax.fori_loop(0, at.blocks_E[-1], more, out)
  return out, (x_NxD, weights_NxK, gate_up_ExDx2F, down_ExFxD, at, h)


def _padded_bwd(kept: tuple, dout_NxD: chex.Array) -> tuple:
  x_NxD, weights_NxK, gate_up_ExDx2F, down_ExFxD, at, h = kept
  n, k = weights_NxK.shape
  flat_weights = weights_NxK.astype(x_NxD.dtype).reshape(-1)

  def gradients(copy: chex.Array, x: chex.Array, h: chex.Array, *kernels: chex.Array) -> tuple:
    weight = jnp.take(flat_weights, copy, mode="fill", fill_value=0)[..., None]
    return _gradients(x, h, weight, _rows(dout_NxD, copy, k), *kernels)

  def of_copies(of_slots: chex.Array, width: int) -> chex.Array:
    flat = of_slots.reshape(-1, width)
    return jnp.take(flat, at.slot_NK, axis=0, mode="fill", fill_value=0).reshape(n, k, width)

  x = _rows(x_NxD, at.copy_ExC, k)
  dx, dw, dgate_up, ddown = gradients(at.copy_ExC, x, h, gate_up_ExDx2F, down_ExFxD)
  dx, dw = of_copies(dx, x_NxD.shape[1]).sum(axis=1), of_copies(dw, 1).reshape(-1)

  def more(j: chex.Array, sums: tuple) -> tuple:
    e, copy = _block(at, j)
    x, kernels = _rows(x_NxD, copy, k), (gate_up_ExDx2F[e], down_ExFxD[e])
    dx_b, dw_b, dgate_up_b, ddown_b = gradients(copy, x, x @ kernels[0], *kernels)
    dx, dw, dgate_up, ddown = sums
    return (
      dx.at[copy // k].add(dx_b, mode="drop"),
      dw.at[copy].set(dw_b, mode="drop"),
      dgate_up.at[e].add(dgate_up_b),
      ddown.at[e].add(ddown_b),
    )

  dx, dw, *dkernels = jax.lax.fori_loop(0, at.blocks_E[-1], more, (dx, dw, dgate_up, ddown))
  return dx, dw.reshape(n, k).astype(weights_NxK.dtype), None, *dkernels


@jax.custom_vjp
def experts_padded(
  x_NxD: chex.Array,
  weights_NxK: chex.Array,
  experts_NxK: chex.Array,
  gate_up_ExDx2F: chex.Array,
  down_ExFxD: chex.Array,
) -> chex.Array:
  """The chosen experts only: [N, D].

  Each expert has a little more slots than an even router would fill, and one batched product per
  projection computes them all where the weights lie. Copies beyond the slots follow in blocks, in a
  loop as long as needed: no token is dropped, whatever the router does, and shapes are static.
  An expert id E stands for nowhere: it adds nothing.
  """
  return _padded_fwd(x_NxD, weights_NxK, experts_NxK, gate_up_ExDx2F, down_ExFxD)[0]


experts_padded.defvjp(_padded_fwd, _padded_bwd)


def experts_ragged(
  x_NxD: chex.Array,
  weights_NxK: chex.Array,
  experts_NxK: chex.Array,
  gate_up_ExDx2F: chex.Array,
  down_ExFxD: chex.Array,
  grouped_matmul: Callable[..., chex.Array] = jax.lax.ragged_dot,
) -> chex.Array:
  """The chosen experts only, by `grouped_matmul(rows, weights, sizes)`: [N, D].

  An expert id E stands for nowhere: it adds nothing.
  """
  n, k = experts_NxK.shape
  flat = experts_NxK.reshape(-1)
  iota = jax.lax.iota(jnp.int32, n * k)
  _, order = jax.lax.sort((flat, iota), num_keys=1)
  place = jnp.zeros(n * k, jnp.int32).at[order].set(iota, unique_indices=True)
  sizes = jnp.sum(jax.nn.one_hot(flat, down_ExFxD.shape[0], dtype=jnp.int32), axis=0)
  # Copies for no expert here (id E) are sorted behind the others: no group has them, and what a
  # matmul leaves there, or its backward pass, can be anything.
  real = (iota < jnp.sum(sizes))[:, None]
  x = jnp.where(real, _permute(jnp.repeat(x_NxD, k, axis=0), order, place), 0)
  h = _activate(jnp.where(real, grouped_matmul(x, gate_up_ExDx2F, sizes), 0))
  y = jnp.where(real, grouped_matmul(h, down_ExFxD, sizes), 0)
  y = _permute(y, place, order).reshape(n, k, -1)
  return jnp.einsum("nkd,nk->nd", y, weights_NxK.astype(y.dtype))


def experts_megablox(
  x_NxD: chex.Array,
  weights_NxK: chex.Array,
  experts_NxK: chex.Array,
  gate_up_ExDx2F: chex.Array,
  down_ExFxD: chex.Array,
) -> chex.Array:
  """The chosen experts only, by TPU kernels: [N, D]."""
  from rome.models import megablox  # Pallas takes a while to import; only TPUs need it.

  matmul = megablox.grouped_matmul
  return experts_ragged(x_NxD, weights_NxK, experts_NxK, gate_up_ExDx2F, down_ExFxD, matmul)


EXPERTS: dict[str, Callable[..., chex.Array]] = {
  "dense": experts_dense,
  "padded": experts_padded,
  "ragged": experts_ragged,
  "megablox": experts_megablox,
}
