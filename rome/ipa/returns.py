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
  rewards_NxK: chex.Array,
  num_chunks_N: chex.Array,
  step: chex.Numeric,
  config: IPAConfig,
  group_ids_N: chex.Array | None = None,
  truncated_N: chex.Array | None = None,
) -> tuple[chex.Array, chex.Array]:
  """Returns and signs as the loss wants them: failure reward, baseline, discount, scale, masks.

  A trajectory is positive iff its undiscounted rewards, before any shaping, sum to more than 0 (Eq.
  9's T+). In this order: a non-positive one gets `failure_reward` added to its last chunk's reward
  (Choice: added, so that what the environment itself gave is kept); the baseline of
  `config.centre` is taken from the last chunk's reward, so that it is discounted as the reward is
  (Choice); rewards are discounted (Eq. 7), divided by the deviation of `config.scale` and clipped;
  non-positive trajectories are scaled by `config.negative_scale(step)`; truncated ones are masked.
  Masked ones still count in the statistics and in Z. The step enters here and not in the loss,
  which thereby stays a function of the batch alone.

  Args:
    rewards_NxK: as in `discounted_chunk_returns`.
    num_chunks_N: int, all chunks of each episode.
    step: the update that the batch is for, from 0; may be traced.
    config: reads gamma, failure_reward, centre, scale, advantage_clip, negative_start_step,
      negative_weight, truncated_episodes.
    group_ids_N: int in 0..N-1, samples of one task share one; needed by "group" and
      "leave_one_out".
    truncated_N: bool, whether a limit cut the episode off; needed unless truncated_episodes is
      "keep".

  Returns:
    (returns_NxK, positive_N): float, 0 beyond num_chunks; and bool.

  Raises:
    ValueError: a setting needs `group_ids_N` or `truncated_N`, and there is none.
  """
  chex.assert_rank([rewards_NxK, num_chunks_N, step], [2, 1, 0])
  chex.assert_equal_shape_prefix([rewards_NxK, num_chunks_N], 1)
  _require_inputs(config, group_ids_N, truncated_N)
  rewards_NxK = at_least_float32(rewards_NxK)
  real_NxK = _real_chunks(rewards_NxK, num_chunks_N)
  rewards_NxK = jnp.where(real_NxK, rewards_NxK, 0)
  positive_N = rewards_NxK.sum(axis=1) > 0

  index_NxK = jax.lax.broadcasted_iota(jnp.int32, rewards_NxK.shape, 1)
  last_NxK = index_NxK == jnp.asarray(num_chunks_N)[:, None] - 1
  failed_NxK = last_NxK & ~positive_N[:, None]
  rewards_NxK = rewards_NxK + jnp.where(failed_NxK, config.failure_reward, 0.0)
  total_N = rewards_NxK.sum(axis=1)
  baseline_N = _baseline(total_N, group_ids_N, config.centre)
  rewards_NxK = rewards_NxK - jnp.where(last_NxK, baseline_N[:, None], 0.0)
  returns_NxK = discounted_chunk_returns(rewards_NxK, num_chunks_N, config.gamma)

  returns_NxK = returns_NxK / _deviation(total_N, group_ids_N, config.scale)[:, None]
  returns_NxK = jnp.clip(returns_NxK, -config.advantage_clip, config.advantage_clip)
  scale_N = jnp.where(positive_N, 1.0, config.negative_scale(step)).astype(returns_NxK.dtype)
  if config.truncated_episodes != "keep":
    masked_N = jnp.asarray(truncated_N).astype(bool)
    if config.truncated_episodes == "mask_negative":
      masked_N = masked_N & ~positive_N
    scale_N = jnp.where(masked_N, 0, scale_N)
  return returns_NxK * scale_N[:, None], positive_N


def _require_inputs(
  config: IPAConfig, group_ids_N: chex.Array | None, truncated_N: chex.Array | None
) -> None:
  for name, needs in (("centre", ("group", "leave_one_out")), ("scale", ("group",))):
    if group_ids_N is None and getattr(config, name) in needs:
      raise ValueError(f"IPAConfig.{name}={getattr(config, name)!r} needs group_ids_N")
  if truncated_N is None and config.truncated_episodes != "keep":
    raise ValueError(
      f"IPAConfig.truncated_episodes={config.truncated_episodes!r} needs truncated_N"
    )


def _group_sums(values_N: chex.Array, group_ids_N: chex.Array) -> chex.Array:
  """The sum over each member's group, for every member: [N]."""
  sums = jax.ops.segment_sum(values_N, group_ids_N, num_segments=len(values_N))
  return sums[jnp.asarray(group_ids_N)]


def _baseline(total_N: chex.Array, group_ids_N: chex.Array | None, centre: str) -> chex.Array:
  if centre == "none":
    return jnp.zeros_like(total_N)
  if centre == "batch":
    group_ids_N = jnp.zeros(len(total_N), jnp.int32)
  size_N = _group_sums(jnp.ones_like(total_N), group_ids_N)
  sum_N = _group_sums(total_N, group_ids_N)
  if centre == "leave_one_out":
    # A group of one has no others: its baseline is 0, and its reward stays as it is.
    return (sum_N - total_N) / jnp.maximum(size_N - 1, 1)
  return sum_N / size_N


def _deviation(total_N: chex.Array, group_ids_N: chex.Array | None, scale: str) -> chex.Array:
  """Population deviation, and 1 where it vanishes: there is nothing to scale where all agree."""
  if scale == "none":
    return jnp.ones_like(total_N)
  if scale == "batch":
    group_ids_N = jnp.zeros(len(total_N), jnp.int32)
  size_N = _group_sums(jnp.ones_like(total_N), group_ids_N)
  mean_N = _group_sums(total_N, group_ids_N) / size_N
  deviation_N = jnp.sqrt(_group_sums((total_N - mean_N) ** 2, group_ids_N) / size_N)
  return jnp.where(deviation_N > 1e-6, deviation_N, 1.0)


def _real_chunks(rewards_NxK: chex.Array, num_chunks_N: chex.Array) -> chex.Array:
  index_NxK = jax.lax.broadcasted_iota(jnp.int32, rewards_NxK.shape, 1)
  return index_NxK < jnp.asarray(num_chunks_N)[:, None]
