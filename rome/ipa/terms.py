"""What the estimators share: `ipa_loss`, `rome.ipa.baselines` and `rome.ipa.clipped`.

An estimator is an objective a token; the imitation term of Eq. 10, the normalisers, the safety from
what unused places hold and the metrics are the same for all, and are here.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from rome.ipa.batch import ChunkBatch
from rome.ipa.chunks import at_least_float32, chunk_lengths, chunk_sums, spread_to_tokens
from rome.ipa.config import IPAConfig
from rome.ipa.totals import TermTotals, Totals, inverse_normaliser, loss_totals


@dataclasses.dataclass(frozen=True)
class Terms:
  """A batch as the estimators read it: finite everywhere, whatever unused places hold.

  Attributes:
    batch: the batch itself.
    totals: global counts.
    logp_BxT: at least float32, 0 outside chunks. The only field that carries a gradient.
    old_BxT: log-prob under pi_old; sg(logp) where the batch is on-policy and wherever no chunk is
      reinforced.
    log_mismatch_BxT: log pi_old/mu, 0 wherever no chunk is reinforced.
    returns_BxT: return or advantage of the token's chunk, 0 outside chunks.
    positive_BxT: bool, whether the token's trajectory is positive.
    rl_BxT: bool, whether the token's chunk is reinforced.
    lengths_BxC: tokens of each chunk.
    rl_BxC, il_BxC: bool, the chunks that exist and are reinforced or imitated.
    entropy_BxT: as given; may be None.
  """

  batch: ChunkBatch
  totals: Totals
  logp_BxT: chex.Array
  old_BxT: chex.Array
  log_mismatch_BxT: chex.Array
  returns_BxT: chex.Array
  positive_BxT: chex.Array
  rl_BxT: chex.Array
  lengths_BxC: chex.Array
  rl_BxC: chex.Array
  il_BxC: chex.Array
  entropy_BxT: chex.Array | None

  @property
  def log_ratio_BxT(self) -> chex.Array:
    """log pi_theta/pi_old of each token, differentiable; 0 wherever no chunk is reinforced."""
    return self.logp_BxT - self.old_BxT


def read_terms(
  logp_BxT: chex.Array,
  batch: ChunkBatch,
  totals: Totals | None,
  entropy_BxT: chex.Array | None,
) -> Terms:
  """Checks shapes and lays out what the estimators need; arguments as in `ipa_loss`."""
  chunk_ids_BxT, returns_BxC = batch.chunk_ids, batch.returns
  chex.assert_rank([logp_BxT, chunk_ids_BxT, returns_BxC], 2)
  chex.assert_equal_shape([logp_BxT, chunk_ids_BxT, batch.behavior_logp])
  chex.assert_equal_shape([returns_BxC, batch.positive, batch.il_mask, batch.trajectory_ids])
  chex.assert_axis_dimension_gt(returns_BxC, 1, 0)

  logp_BxT = jnp.where(chunk_ids_BxT >= 0, at_least_float32(logp_BxT), 0)
  policy_BxT = jax.lax.stop_gradient(logp_BxT)
  lengths_BxC = chunk_lengths(chunk_ids_BxT, returns_BxC.shape[1])
  il_BxC = (lengths_BxC > 0) & batch.il_mask.astype(bool)
  rl_BxC = (lengths_BxC > 0) & ~batch.il_mask.astype(bool)
  rl_BxT = spread_to_tokens(rl_BxC, chunk_ids_BxT)
  old_BxT = policy_BxT if batch.old_logp is None else at_least_float32(batch.old_logp)
  log_mismatch_BxT = old_BxT - at_least_float32(batch.behavior_logp)
  returns_BxC = jax.lax.stop_gradient(at_least_float32(returns_BxC))
  return Terms(
    batch=batch,
    totals=loss_totals(batch) if totals is None else totals,
    logp_BxT=logp_BxT,
    old_BxT=jax.lax.stop_gradient(jnp.where(rl_BxT, old_BxT, policy_BxT)),
    log_mismatch_BxT=jax.lax.stop_gradient(jnp.where(rl_BxT, log_mismatch_BxT, 0)),
    returns_BxT=spread_to_tokens(returns_BxC, chunk_ids_BxT),
    positive_BxT=spread_to_tokens(batch.positive.astype(bool), chunk_ids_BxT),
    rl_BxT=rl_BxT,
    lengths_BxC=lengths_BxC,
    rl_BxC=rl_BxC,
    il_BxC=il_BxC,
    entropy_BxT=entropy_BxT,
  )


def trajectory_log_ratio(terms: Terms) -> chex.Array:
  """Mean log-ratio of each token's trajectory: log rho(tau) = mean_{t in tau} log_ratio_t.

  The geometric mean of Eq. 4 (arXiv:2512.24873), over the reinforced tokens of all rows.

  Returns:
    log_ratio_BxT, without gradient, 0 wherever no chunk is reinforced. A trajectory that is cut
    between micro-batches gives NaN rather than the mean of a part; so does an id beyond N.
  """
  batch, whole_N = terms.batch, terms.totals.rl.trajectory_tokens
  log_ratio_BxT = jax.lax.stop_gradient(terms.log_ratio_BxT)
  sums_BxC = chunk_sums(log_ratio_BxT, batch.chunk_ids, terms.rl_BxC.shape[1])
  used_BxC = jnp.where(terms.rl_BxC, batch.trajectory_ids, 0)

  def by_trajectory(values_BxC: chex.Array) -> chex.Array:
    values_BxC = jnp.where(terms.rl_BxC, values_BxC, 0)
    return jax.ops.segment_sum(values_BxC.reshape(-1), used_BxC.reshape(-1), len(whole_N))

  here_N = by_trajectory(terms.lengths_BxC)
  mean_N = jnp.where(here_N == whole_N, by_trajectory(sums_BxC) / jnp.maximum(here_N, 1), jnp.nan)
  mean_BxC = mean_N.at[used_BxC].get(mode="fill", fill_value=jnp.nan)
  return spread_to_tokens(jnp.where(terms.rl_BxC, mean_BxC, 0), batch.chunk_ids)


def hybrid_loss(
  terms: Terms,
  config: IPAConfig,
  normaliser: str,
  objective_BxT: chex.Array | None = None,
  weight_BxC: chex.Numeric = 1.0,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """Eq. 10 (arXiv:2512.24873) with any reinforcement objective.

    L = -(lambda_rl/Z_rl) sum_c sg(w_c) sum_{t in c} objective_t
        - (lambda_il/Z_il) sum_c sg(f_c G_c) sum_{t in c} logp_t
  over reinforced and over imitated chunks, and the `regulariser` over Z_rl; f_c = 1, or pi_theta(c)
  by `config.il_weight`.

  Args:
    terms: the batch.
    config: reads lambda_rl, lambda_il, il_weight, kl_weight, entropy_weight and, for Z_il,
      normaliser.
    normaliser: Z_rl.
    objective_BxT: what each token adds to the objective; not read where no chunk is reinforced.
      None: logp.
    weight_BxC: w_c, or 1 for all; not read where no chunk is reinforced.

  Returns:
    (loss, metrics): loss_rl, loss_il and loss_regulariser (the parts of the loss), tokens, chunks
    and il_tokens (counts of this slice).
  """
  batch, logp_BxT, lengths_BxC = terms.batch, terms.logp_BxT, terms.lengths_BxC

  def over_z(name: str, counts: TermTotals) -> chex.Array:
    return inverse_normaliser(name, lengths_BxC, batch.trajectory_ids, counts)

  rl_scale_BxC = over_z(normaliser, terms.totals.rl)
  il_weight_BxC = at_least_float32(batch.returns)
  if config.il_weight == "policy":
    il_weight_BxC *= jnp.exp(chunk_sums(logp_BxT, batch.chunk_ids, lengths_BxC.shape[1]))
  il_factor_BxC = config.lambda_il * (il_weight_BxC * over_z(config.normaliser, terms.totals.il))

  # A chunk is in one term only, so both share one factor a chunk; an empty slot has none, whatever
  # it holds.
  factor_BxC = jnp.where(terms.rl_BxC, config.lambda_rl * (weight_BxC * rl_scale_BxC), 0)
  factor_BxC = jnp.where(terms.il_BxC, il_factor_BxC, factor_BxC)
  factor_BxT = spread_to_tokens(jax.lax.stop_gradient(factor_BxC), batch.chunk_ids)
  if objective_BxT is None:
    loss_BxT = -factor_BxT * logp_BxT
  else:
    loss_BxT = -factor_BxT * jnp.where(terms.rl_BxT, objective_BxT, logp_BxT)

  rl_scale_BxT = spread_to_tokens(jnp.where(terms.rl_BxC, rl_scale_BxC, 0), batch.chunk_ids)
  penalty = regulariser(logp_BxT, batch.ref_logp, terms.entropy_BxT, rl_scale_BxT, config)
  return loss_BxT.sum() + penalty, {
    "loss_rl": jnp.where(terms.rl_BxT, loss_BxT, 0).sum(),
    "loss_il": jnp.where(terms.rl_BxT, 0, loss_BxT).sum(),
    "loss_regulariser": penalty,
    "tokens": jnp.where(terms.rl_BxC, lengths_BxC, 0).sum(),
    "il_tokens": jnp.where(terms.il_BxC, lengths_BxC, 0).sum(),
    "chunks": terms.rl_BxC.sum(dtype=lengths_BxC.dtype),
  }


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


def token_metrics(
  terms: Terms,
  log_ratio_BxT: chex.Array,
  weight_BxT: chex.Array,
  cut_BxT: chex.Array,
  kept_BxT: chex.Array,
) -> dict[str, chex.Array]:
  """The diagnostics of `policy_metrics` for estimators that weigh tokens.

  Args:
    terms: the batch.
    log_ratio_BxT: log of the ratio that the estimator looks at.
    weight_BxT: factor on the token's return in the gradient.
    cut_BxT: bool, tokens whose ratio was truncated or clipped.
    kept_BxT: bool, tokens that no mask took out.

  Returns:
    masked_share, truncated_share, ratio_mean, weight_mean, weight_square_mean, mismatch_mean,
    mismatch_max: over reinforced tokens, where `ipa_loss` has all but the last two over chunks.
    positive_share: chunks of positive trajectories, as there.
  """
  counts = terms.totals.rl

  def mean(values_BxT: chex.Array) -> chex.Array:
    return jnp.where(terms.rl_BxT, values_BxT, 0.0).sum() / jnp.maximum(counts.tokens, 1)

  positive_BxC = terms.rl_BxC & terms.batch.positive.astype(bool)
  mismatch_BxT = jnp.abs(terms.log_mismatch_BxT)
  return {
    "masked_share": mean(~kept_BxT),
    "truncated_share": mean(cut_BxT),
    "positive_share": jnp.where(positive_BxC, 1.0, 0.0).sum() / jnp.maximum(counts.chunks, 1),
    "ratio_mean": mean(jnp.exp(log_ratio_BxT)),
    "weight_mean": mean(weight_BxT),
    "weight_square_mean": mean(weight_BxT**2),
    "mismatch_mean": mean(mismatch_BxT),
    "mismatch_max": mismatch_BxT.max(initial=0.0),
  }
