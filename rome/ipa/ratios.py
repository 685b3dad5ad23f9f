"""The chunk ratio, the mismatch mask and the truncated weight (Eqs. 8-9, arXiv:2512.24873).

Two ratios are kept apart: pi_theta/pi_old says how far the policy has moved since it sampled,
pi_old/mu how far the engine's arithmetic is from the trainer's. Both are geometric means over a
chunk and stay logarithms until the last moment, so that nothing overflows.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

from rome.ipa.batch import ChunkBatch
from rome.ipa.chunks import at_least_float32, chunk_lengths, chunk_sums
from rome.ipa.config import IPAConfig


def chunk_log_ratio(
  logp_BxT: chex.Array, other_logp_BxT: chex.Array, chunk_ids_BxT: chex.Array, max_chunks: int
) -> chex.Array:
  """Mean log-ratio of each chunk: log rho_c = mean_{t in c} (logp_t - other_logp_t) (Eq. 8).

  Differences are taken token by token before they are summed, so equal inputs give exactly 0 in any
    precision.

  Args:
    logp_BxT: log-probs under the numerator's policy; not read outside chunks.
    other_logp_BxT: log-probs under the denominator's policy; not read outside chunks.
    chunk_ids_BxT: int, -1 outside chunks, else 0..max_chunks-1.
    max_chunks: C (static).

  Returns:
    log_ratio_BxC, 0 for an empty slot. Differentiable; the loss stops its gradient.
  """
  chex.assert_rank([logp_BxT, other_logp_BxT, chunk_ids_BxT], 2)
  chex.assert_equal_shape([logp_BxT, other_logp_BxT, chunk_ids_BxT])
  difference_BxT = at_least_float32(logp_BxT) - at_least_float32(other_logp_BxT)
  difference_BxT = jnp.where(chunk_ids_BxT >= 0, difference_BxT, 0)
  sums_BxC = chunk_sums(difference_BxT, chunk_ids_BxT, max_chunks)
  return sums_BxC / jnp.maximum(chunk_lengths(chunk_ids_BxT, max_chunks), 1)


def mismatch_mask(log_ratio_BxC: chex.Array, lower: float, upper: float) -> chex.Array:
  """m_c = 1[lower <= pi_old/mu <= upper] on the chunk's geometric mean (Eq. 8): bool [B, C].

  Args:
    log_ratio_BxC: mean log pi_old/mu of each chunk.
    lower: lower bound of the ratio; 0 = none. Choice: the paper has an upper bound only.
    upper: H; inf = none.
  """
  chex.assert_rank(log_ratio_BxC, 2)
  log_lower = math.log(lower) if lower > 0 else -math.inf
  return (log_ratio_BxC >= log_lower) & (log_ratio_BxC <= math.log(upper))


def truncated_weight(log_ratio_BxC: chex.Array, positive_BxC: chex.Array) -> chex.Array:
  """w_c of Eq. 9: 1 for a positive trajectory's chunk, else [rho_c]_0^1.

  Args:
    log_ratio_BxC: mean log pi_theta/pi_old of each chunk.
    positive_BxC: bool, whether the chunk's trajectory is positive.
  """
  chex.assert_rank([log_ratio_BxC, positive_BxC], 2)
  chex.assert_equal_shape([log_ratio_BxC, positive_BxC])
  return jnp.where(positive_BxC, 1.0, jnp.exp(jnp.minimum(log_ratio_BxC, 0.0)))


@dataclasses.dataclass(frozen=True)
class ChunkRatios:
  """What Eqs. 8-9 say of every chunk slot; empty and imitated slots hold values nobody may use.

  Attributes:
    log_ratio_BxC: mean log pi_theta/pi_old, exactly 0 on-policy.
    kept_BxC: bool, m_c.
    weight_BxC: m_c w_c, the factor on the chunk's return.
  """

  log_ratio_BxC: chex.Array
  kept_BxC: chex.Array
  weight_BxC: chex.Array


def chunk_ratios(logp_BxT: chex.Array, batch: ChunkBatch, config: IPAConfig) -> ChunkRatios:
  """Ratios, masks and weights of every chunk (Eqs. 8-9, arXiv:2512.24873).

  Args:
    logp_BxT: log-probs under pi_theta; not read outside chunks.
    batch: reads chunk_ids, old_logp, behavior_logp and positive.
    config: reads mask_lower and mask_upper.

  Returns:
    `ChunkRatios`, without gradient.
  """
  max_chunks = batch.positive.shape[1]
  policy_BxT = jax.lax.stop_gradient(logp_BxT)
  old_BxT = policy_BxT if batch.old_logp is None else batch.old_logp
  log_mismatch_BxC = chunk_log_ratio(old_BxT, batch.behavior_logp, batch.chunk_ids, max_chunks)
  if batch.old_logp is None:
    log_ratio_BxC = jnp.zeros_like(log_mismatch_BxC)
  else:
    log_ratio_BxC = chunk_log_ratio(policy_BxT, old_BxT, batch.chunk_ids, max_chunks)
  kept_BxC = mismatch_mask(log_mismatch_BxC, config.mask_lower, config.mask_upper)
  weight_BxC = truncated_weight(log_ratio_BxC, batch.positive.astype(bool))
  return ChunkRatios(log_ratio_BxC, kept_BxC, jnp.where(kept_BxC, weight_BxC, 0.0))
