"""The experts of a sparse layer: SwiGLU on the chosen experts, dropless.

Implementations, equal up to rounding:
  dense   every expert on every token. A token's bits depend on that token alone, which is why
          generation uses it; also the oracle of the others.
  padded  sorts token copies by expert, pads each group to whole blocks, one batched matmul a
          projection. Work is proportional to the chosen experts: what CPUs train with.
  ragged  sorts token copies by expert; `jax.lax.ragged_dot`. What TPUs and GPUs train with; on CPU
          it computes every expert.
"""

import chex
import jax
import jax.numpy as jnp


def _swiglu(x_GxMxD: chex.Array, gate_up_GxDx2F: chex.Array, down_GxFxD: chex.Array) -> chex.Array:
  """SwiGLU of a batch of experts: [G, M, D]; the first half of `gate_up` is the gate."""
  h = jnp.einsum("gmd,gdf->gmf", x_GxMxD, gate_up_GxDx2F)
  gate, up = jnp.split(h, 2, axis=-1)
  return jnp.einsum("gmf,gfd->gmd", jax.nn.silu(gate) * up, down_GxFxD)


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


def experts_padded(
  x_NxD: chex.Array,
  weights_NxK: chex.Array,
  experts_NxK: chex.Array,
  gate_up_ExDx2F: chex.Array,
  down_ExFxD: chex.Array,
  block: int = 256,
) -> chex.Array:
  """The chosen experts only: [N, D].

  Token copies are sorted by expert and laid out so that each expert's group starts on a block
  boundary. N*K copies need at most N*K/block + E blocks whatever the router does, so shapes are
  static and no token is dropped.
  """
  n, k = experts_NxK.shape
  num_experts = down_ExFxD.shape[0]
  num_blocks = -(-n * k // block) + num_experts
  flat = experts_NxK.reshape(-1)
  iota = jax.lax.iota(jnp.int32, n * k)
  sorted_expert, order = jax.lax.sort((flat, iota), num_keys=1)
  sizes = jnp.sum(jax.nn.one_hot(flat, num_experts, dtype=jnp.int32), axis=0)
  blocks = -(-sizes // block)
  first_block = jnp.cumsum(blocks) - blocks
  first_row = jnp.cumsum(sizes) - sizes
  place = first_block[sorted_expert] * block + iota - first_row[sorted_expert]
  place_of_copy = jnp.zeros(n * k, jnp.int32).at[order].set(place, unique_indices=True)
  copy_at = jnp.full(num_blocks * block, n * k, jnp.int32).at[place].set(order, unique_indices=True)
  block_expert = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(num_blocks), side="right")
  block_expert = jnp.minimum(block_expert, num_experts - 1)

  copies = jnp.repeat(x_NxD, k, axis=0)
  x = _permute(copies, copy_at, place_of_copy).reshape(num_blocks, block, -1)
  y = _swiglu(x, gate_up_ExDx2F[block_expert], down_ExFxD[block_expert])
  y = _permute(y.reshape(num_blocks * block, -1), place_of_copy, copy_at)
  return jnp.einsum("nkd,nk->nd", y.reshape(n, k, -1), weights_NxK.astype(y.dtype))


def experts_ragged(
  x_NxD: chex.Array,
  weights_NxK: chex.Array,
  experts_NxK: chex.Array,
  gate_up_ExDx2F: chex.Array,
  down_ExFxD: chex.Array,
) -> chex.Array:
  """The chosen experts only, by `jax.lax.ragged_dot`: [N, D]."""
  n, k = experts_NxK.shape
  flat = experts_NxK.reshape(-1)
  iota = jax.lax.iota(jnp.int32, n * k)
  _, order = jax.lax.sort((flat, iota), num_keys=1)
  place = jnp.zeros(n * k, jnp.int32).at[order].set(iota, unique_indices=True)
  sizes = jnp.sum(jax.nn.one_hot(flat, down_ExFxD.shape[0], dtype=jnp.int32), axis=0)
  x = _permute(jnp.repeat(x_NxD, k, axis=0), order, place)
  gate, up = jnp.split(jax.lax.ragged_dot(x, gate_up_ExDx2F, sizes), 2, axis=-1)
  y = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down_ExFxD, sizes)
  y = _permute(y, place, order).reshape(n, k, -1)
  return jnp.einsum("nkd,nk->nd", y, weights_NxK.astype(y.dtype))


EXPERTS = {"dense": experts_dense, "padded": experts_padded, "ragged": experts_ragged}
