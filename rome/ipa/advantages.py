"""Advantages over groups and over anchor states, on whole trajectories before they are packed.

Those over groups alone (GRPO, Dr. GRPO, RLOO) are settings of `shaped_returns`.
"""

import chex
import jax
import jax.numpy as jnp

from rome.ipa.chunks import at_least_float32
from rome.ipa.returns import discounted_chunk_returns


def gigpo_advantages(
  rewards_NxK: chex.Array,
  num_chunks_N: chex.Array,
  group_ids_N: chex.Array,
  state_ids_NxK: chex.Array,
  gamma: chex.Numeric = 0.95,
  step_weight: chex.Numeric = 1.0,
  scale: str = "group",
) -> chex.Array:
  """Advantage of each chunk within its group and at its state (GiGPO, arXiv:2505.10978).

  A = A_E + step_weight A_S. A_E compares the trajectory's undiscounted reward with those of its
  group; A_S compares the chunk's discounted return with those of all chunks that the group took in
  the same state, a state visited twice by one trajectory counting twice.

  Args:
    rewards_NxK: reward received after each chunk; not read at and beyond num_chunks.
    num_chunks_N: int, all chunks of each episode.
    group_ids_N: int, samples of one task share one.
    state_ids_NxK: int, equal within a group iff the state in front of the chunk is the same; not
      read at and beyond num_chunks. Ids of different groups need not differ.
    gamma: discount per chunk of the step returns, in (0, 1]. The paper's value.
    step_weight: omega, the weight of A_S. The paper's value.
    scale: what differences from the mean are divided by: the "group"'s population deviation, or
      "none" (1). Choice: 1 too where the deviation vanishes, so a chunk alone in its state gets 0.

  Returns:
    advantages_NxK, in at least float32, 0 beyond num_chunks.

  Raises:
    ValueError: scale is neither.
  """
  chex.assert_rank([rewards_NxK, num_chunks_N, group_ids_N, state_ids_NxK], [2, 1, 1, 2])
  chex.assert_equal_shape([rewards_NxK, state_ids_NxK])
  chex.assert_equal_shape([num_chunks_N, group_ids_N])
  chex.assert_equal_shape_prefix([rewards_NxK, num_chunks_N], 1)
  if scale not in ("none", "group"):
    raise ValueError(f"scale must be 'none' or 'group', got {scale!r}")

  rewards_NxK = at_least_float32(rewards_NxK)
  index_NxK = jax.lax.broadcasted_iota(jnp.int32, rewards_NxK.shape, 1)
  real_NxK = index_NxK < jnp.asarray(num_chunks_N)[:, None]
  groups_NxK = jnp.broadcast_to(jnp.asarray(group_ids_N)[:, None], rewards_NxK.shape)

  totals_N = jnp.where(real_NxK, rewards_NxK, 0).sum(axis=1)
  same_task_N = _dense_ids(jnp.asarray(group_ids_N))
  episode_N = _standardised(totals_N, same_task_N, jnp.ones_like(totals_N), scale)

  returns_NxK = discounted_chunk_returns(rewards_NxK, num_chunks_N, gamma)
  same_state_M = _dense_ids(groups_NxK.reshape(-1), jnp.asarray(state_ids_NxK).reshape(-1))
  counted_M = real_NxK.reshape(-1).astype(returns_NxK.dtype)
  step_M = _standardised(returns_NxK.reshape(-1), same_state_M, counted_M, scale)
  advantages_NxK = episode_N[:, None] + step_weight * step_M.reshape(rewards_NxK.shape)
  return jnp.where(real_NxK, advantages_NxK, 0)


def _dense_ids(*keys_M: chex.Array) -> chex.Array:
  """Numbers the distinct tuples of keys 0, 1, ... in their order: int32 [M]."""
  index_M = jax.lax.iota(jnp.int32, len(keys_M[0]))
  *sorted_M, order_M = jax.lax.sort((*keys_M, index_M), num_keys=len(keys_M))
  starts_M = jnp.zeros(index_M.shape, bool)
  for key_M in sorted_M:
    starts_M |= key_M != jnp.roll(key_M, 1)
  starts_M = starts_M.at[:1].set(False)
  return jnp.zeros_like(index_M).at[order_M].set(jnp.cumsum(starts_M, dtype=jnp.int32))


def _standardised(
  values_M: chex.Array, ids_M: chex.Array, counted_M: chex.Array, scale: str
) -> chex.Array:
  """values - mean, over the deviation if scale is "group"; both over equal ids with counted = 1."""

  def sums(terms_M: chex.Array) -> chex.Array:
    return jax.ops.segment_sum(counted_M * terms_M, ids_M, num_segments=len(ids_M))[ids_M]

  size_M = jnp.maximum(sums(jnp.ones_like(values_M)), 1)
  centred_M = values_M - sums(values_M) / size_M
  if scale == "none":
    return centred_M
  deviation_M = jnp.sqrt(sums(centred_M**2) / size_M)
  return centred_M / jnp.where(deviation_M > 1e-6, deviation_M, 1.0)
