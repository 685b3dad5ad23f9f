"""Chunk returns (Eq. 7) and the shaping of rewards, on whole trajectories before they are packed.

The loss never discounts: a chunk that is masked, truncated or cut out of a batch must not change
another chunk's exponent, so returns are taken here, where all chunks of the episode are at hand.
"""

import chex
import jax
import jax.numpy as jnp

from rome.ipa.chunks import at_least_float32
from rome.ipa.config import IPAConfig


def discounted_chunk_returns(
  rewards_NxK: chex.Array, num_chunks_N: chex.Array, gamma: chex.Numeric
) -> chex.Array:
  """Discounted return of every chunk: G_k = sum_{j>=k} gamma^(j-k) r_j (Eq. 7, arXiv:2512.24873).

  With a reward at the end only, this is gamma^(K-k) R. gamma discounts per chunk, not per token.

  Args:
    rewards_NxK: reward received after each chunk; the final reward belongs to chunk num_chunks - 1.
      What lies at and beyond num_chunks is padding and not read.
    num_chunks_N: int, all chunks of the episode, whether or not they will enter the loss.
    gamma: discount in (0, 1].

  Returns:
    returns_NxK, in at least float32, 0 beyond num_chunks.
  """
  chex.assert_rank([rewards_NxK, num_chunks_N], [2, 1])
  chex.assert_equal_shape_prefix([rewards_NxK, num_chunks_N], 1)
  rewards_NxK = at_least_float32(rewards_NxK)
  rewards_NxK = jnp.where(_real_chunks(rewards_NxK, num_chunks_N), rewards_NxK, 0)
  gamma = jnp.asarray(gamma, rewards_NxK.dtype)

  def back(return_N: chex.Array, reward_N: chex.Array) -> tuple[chex.Array, chex.Array]:
    return_N = reward_N + gamma * return_N
    return return_N, return_N

  zero_N = jnp.zeros_like(rewards_NxK, shape=rewards_NxK.shape[:1])
  _, returns_KxN = jax.lax.scan(back, zero_N, rewards_NxK.T, reverse=True)
  return returns_KxN.T


def shaped_returns(
  rewards_NxK: chex.Array, num_chunks_N: chex.Array, step: chex.Numeric, config: IPAConfig
) -> tuple[chex.Array, chex.Array]:
  """Returns and signs as the loss wants them: failure reward, discount, weight of negatives.

  A trajectory is positive iff its undiscounted rewards, before any shaping, sum to more than 0 (Eq.
  9's T+). A non-positive one gets `failure_reward` added to its last chunk's reward (Choice: added,
  so that what the environment itself gave is kept), and its returns are scaled by
  `config.negative_scale(step)`. The step enters here and not in the loss, which thereby stays a
  function of the batch alone.

  Args:
    rewards_NxK: as in `discounted_chunk_returns`.
    num_chunks_N: int, all chunks of each episode.
    step: the update that the batch is for, from 0; may be traced.
    config: reads gamma, failure_reward, negative_start_step, negative_weight.

  Returns:
    (returns_NxK, positive_N): float, 0 beyond num_chunks; and bool.
  """
  chex.assert_rank([rewards_NxK, num_chunks_N, step], [2, 1, 0])
  chex.assert_equal_shape_prefix([rewards_NxK, num_chunks_N], 1)
  rewards_NxK = at_least_float32(rewards_NxK)
  rewards_NxK = jnp.where(_real_chunks(rewards_NxK, num_chunks_N), rewards_NxK, 0)
  positive_N = rewards_NxK.sum(axis=1) > 0

  index_NxK = jax.lax.broadcasted_iota(jnp.int32, rewards_NxK.shape, 1)
  failed_last_NxK = (index_NxK == jnp.asarray(num_chunks_N)[:, None] - 1) & ~positive_N[:, None]
  rewards_NxK = rewards_NxK + jnp.where(failed_last_NxK, config.failure_reward, 0.0)
  returns_NxK = discounted_chunk_returns(rewards_NxK, num_chunks_N, config.gamma)
  scale_N = jnp.where(positive_N, 1.0, config.negative_scale(step)).astype(returns_NxK.dtype)
  return returns_NxK * scale_N[:, None], positive_N


def _real_chunks(rewards_NxK: chex.Array, num_chunks_N: chex.Array) -> chex.Array:
  index_NxK = jax.lax.broadcasted_iota(jnp.int32, rewards_NxK.shape, 1)
  return index_NxK < jnp.asarray(num_chunks_N)[:, None]
