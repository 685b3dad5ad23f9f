"""The IPA loss (Eqs. 9-10) and the supervised loss (Eq. 1), arXiv:2512.24873.

Left out: a critic and a PPO clip, which the equations do not have (`rome.ipa.clipped` has the
estimators that do); return shaping, which whole trajectories get before they are packed
(`shaped_returns`); the mode of the imitation term (whoever builds the batch decides which chunks
are imitated).
"""

import chex
import jax
import jax.numpy as jnp

from rome.ipa.batch import ChunkBatch
from rome.ipa.chunks import at_least_float32, chunk_lengths, chunk_sums, spread_to_tokens
from rome.ipa.config import IPAConfig
from rome.ipa.diagnostics import policy_metrics
from rome.ipa.ratios import chunk_ratios
from rome.ipa.totals import TermTotals, Totals, inverse_normaliser, loss_totals


def ipa_loss(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  config: IPAConfig,
  totals: Totals | None = None,
  entropy_BxT: chex.Array | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Chunk-level policy loss with an imitation term (Eqs. 9-10, arXiv:2512.24873).

  The surrogate whose gradient is minus Eq. 9:
    L_rl = -(1/Z) sum_c sum_{t in c} sg(m_c w_c G_c) logp_t
  over reinforced chunks, where w_c = 1 if positive, else min(rho_c, 1); and with a Z of its own
    L_il = -(1/Z_il) sum_c sum_{t in c} sg(f_c G_c) logp_t
  over imitated ones, where f_c = 1, or pi_theta(c) by `config.il_weight`. Together: lambda_rl L_rl
  + lambda_il L_il, and the `regulariser` where a weight of it is not 0. No gradient flows through
  rho_c, m_c, G_c or f_c, and none reaches a token outside every chunk. Positive chunks carry no
  ratio.

  Args:
    logp_BxT: log-prob of every token under pi_theta, computed by the same temperature and filters
      as it was sampled with. Not read outside chunks. The loss is computed in at least float32.
    batch: returns already discounted and shaped. `old_logp=None` (on-policy) makes every ratio
      exactly 1.
    config: static.
    totals: global counts, so that slices of a batch sum to the whole. None: this batch is the
      whole.
    entropy_BxT: entropy in nats of the distribution that each token was drawn from; needed by
      `config.entropy_weight` > 0, else not read.

  Returns:
    (loss, metrics): scalars. Metrics are loss_rl, loss_il and loss_regulariser (the parts of the
    loss), tokens, chunks, il_tokens (counts of this slice) and those of `policy_metrics`;
    `reduce_metrics` puts the metrics of slices together.
  """
  chunk_ids_BxT, returns_BxC = batch.chunk_ids, batch.returns
  chex.assert_rank([logp_BxT, chunk_ids_BxT, returns_BxC], 2)
  chex.assert_equal_shape([logp_BxT, chunk_ids_BxT, batch.behavior_logp])
  chex.assert_equal_shape([returns_BxC, batch.positive, batch.il_mask, batch.trajectory_ids])
  chex.assert_axis_dimension_gt(returns_BxC, 1, 0)
  max_chunks = returns_BxC.shape[1]
  totals = loss_totals(batch) if totals is None else totals

  inside_BxT = chunk_ids_BxT >= 0
  logp_BxT = jnp.where(inside_BxT, at_least_float32(logp_BxT), 0)
  policy_BxT = jax.lax.stop_gradient(logp_BxT)
  old_BxT = policy_BxT if batch.old_logp is None else at_least_float32(batch.old_logp)
  lengths_BxC = chunk_lengths(chunk_ids_BxT, max_chunks)
  il_BxC = (lengths_BxC > 0) & batch.il_mask.astype(bool)
  rl_BxC = (lengths_BxC > 0) & ~batch.il_mask.astype(bool)

  ratios = chunk_ratios(logp_BxT, batch, config)
  if config.il_weight == "policy":
    il_weight_BxC = jnp.exp(chunk_sums(policy_BxT, chunk_ids_BxT, max_chunks))
  else:
    il_weight_BxC = jnp.ones_like(lengths_BxC)

  def over_z(weight_BxC: chex.Array, counts: TermTotals) -> chex.Array:
    scale_BxC = inverse_normaliser(config.normaliser, lengths_BxC, batch.trajectory_ids, counts)
    return weight_BxC * returns_BxC * scale_BxC

  # A chunk is in one term only, so both share one factor a chunk; an empty slot has none, whatever
  # it holds.
  factor_BxC = jnp.where(rl_BxC, config.lambda_rl * over_z(ratios.weight_BxC, totals.rl), 0)
  factor_BxC = jnp.where(il_BxC, config.lambda_il * over_z(il_weight_BxC, totals.il), factor_BxC)
  factor_BxT = spread_to_tokens(jax.lax.stop_gradient(factor_BxC), chunk_ids_BxT)
  loss_BxT = -factor_BxT * logp_BxT
  loss, penalty = loss_BxT.sum(), jnp.zeros((), loss_BxT.dtype)
  if config.kl_weight or config.entropy_weight:
    scale_BxC = inverse_normaliser(config.normaliser, lengths_BxC, batch.trajectory_ids, totals.rl)
    scale_BxT = spread_to_tokens(jnp.where(rl_BxC, scale_BxC, 0), chunk_ids_BxT)
    penalty = regulariser(logp_BxT, batch.ref_logp, entropy_BxT, scale_BxT, config)

  rl_BxT = spread_to_tokens(rl_BxC, chunk_ids_BxT)
  mismatch_BxT = jnp.abs(old_BxT - at_least_float32(batch.behavior_logp))
  mismatch_BxT = jnp.where(rl_BxT, mismatch_BxT, 0)
  metrics = {
    "loss_rl": jnp.where(rl_BxT, loss_BxT, 0).sum(),
    "loss_il": jnp.where(rl_BxT, 0, loss_BxT).sum(),
    "loss_regulariser": penalty,
    "tokens": jnp.where(rl_BxC, lengths_BxC, 0).sum(),
    "il_tokens": jnp.where(il_BxC, lengths_BxC, 0).sum(),
    "chunks": rl_BxC.sum(dtype=lengths_BxC.dtype),
    **policy_metrics(mismatch_BxT, ratios, batch.positive.astype(bool), rl_BxC, totals.rl),
  }
  return loss + penalty, jax.lax.stop_gradient(metrics)


def regulariser(
  logp_BxT: chex.Array,
  ref_logp_BxT: chex.Array | None,
  entropy_BxT: chex.Array | None,
  scale_BxT: chex.Array,
  config: IPAConfig,
) -> chex.Array:
  """KL penalty and entropy bonus: sum of scale (kl_weight (logp - ref)^2 / 2 - entropy_weight H).

  Choice: the square. Its gradient, (logp - ref) grad logp, is an unbiased estimate of the gradient
  of KL(pi_theta || pi_ref) at the token's context when the policy itself sampled the token, which
  the gradient of the estimators (logp - ref) and exp(ref - logp) - 1 - (ref - logp) is not. Masked
  chunks are regularised as the others are.

  Args:
    logp_BxT: log-prob under pi_theta, finite everywhere.
    ref_logp_BxT: log-prob under the reference policy; not read where scale is 0.
    entropy_BxT: entropy of each token's distribution; not read where scale is 0.
    scale_BxT: constant 1/Z of each token, 0 for tokens that are not reinforced.
    config: reads kl_weight and entropy_weight.

  Raises:
    ValueError: a weight is above 0 and what it weighs is missing.
  """
  chex.assert_equal_shape([logp_BxT, scale_BxT])
  inside_BxT, total = scale_BxT > 0, jnp.zeros((), scale_BxT.dtype)
  if config.kl_weight:
    if ref_logp_BxT is None:
      raise ValueError("IPAConfig.kl_weight > 0 needs ChunkBatch.ref_logp")
    gap_BxT = jnp.where(inside_BxT, logp_BxT - at_least_float32(ref_logp_BxT), 0)
    total += config.kl_weight * (scale_BxT * gap_BxT**2 / 2).sum()
  if config.entropy_weight:
    if entropy_BxT is None:
      raise ValueError("IPAConfig.entropy_weight > 0 needs entropy_BxT")
    entropy_BxT = jnp.where(inside_BxT, at_least_float32(entropy_BxT), 0)
    total -= config.entropy_weight * (scale_BxT * entropy_BxT).sum()
  return total


def sft_loss(
  logp_BxT: chex.Array, chunk_ids_BxT: chex.Array, chunk_mask_BxC: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """Supervised loss over the chunks that are kept (Eq. 1, arXiv:2512.24873), not yet divided.

  L = -sum_k m_k log pi(c_k | s_k) / sum_k m_k |c_k|: sum both results over micro-batches, then
  divide (by at least 1, which stands for the paper's epsilon).

  Args:
    logp_BxT: log-prob of every token under the model; not read outside chunks.
    chunk_ids_BxT: int, -1 outside chunks, else 0..C-1.
    chunk_mask_BxC: bool or float weight m_k of each chunk, such as 0 for a turn that raised an
      error. Constant: no gradient flows through it.

  Returns:
    (sum, weight): -sum_k m_k sum_{t in c_k} logp_t and sum_k m_k |c_k|, scalars.
  """
  chex.assert_rank([logp_BxT, chunk_ids_BxT, chunk_mask_BxC], 2)
  chex.assert_equal_shape([logp_BxT, chunk_ids_BxT])
  chex.assert_equal_shape_prefix([chunk_ids_BxT, chunk_mask_BxC], 1)
  mask_BxC = jax.lax.stop_gradient(at_least_float32(chunk_mask_BxC))
  weight_BxT = spread_to_tokens(mask_BxC, chunk_ids_BxT)
  logp_BxT = jnp.where(chunk_ids_BxT >= 0, at_least_float32(logp_BxT), 0)
  return -(weight_BxT * logp_BxT).sum(), weight_BxT.sum()
